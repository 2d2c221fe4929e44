#include "multi_tensor.h"

#include <algorithm>
#include <cstring>

namespace pecker_fast {
namespace {

// Kernel arguments may be 4 KB, and 32 KB if compiler and driver are of CUDA 12.1 or later.
constexpr int kSmallPayload = 496;
constexpr int kLargePayload = 4000;

template <int N>
struct Payload {
  std::int64_t words[N];
};

template <int N>
__global__ void store_payload(const __grid_constant__ Payload<N> payload, std::int64_t* device, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) device[i] = payload.words[i];
}

template <int N>
void upload(const std::int64_t* host, int count, std::int64_t* device, cudaStream_t stream) {
  Payload<N> payload;
  std::memcpy(payload.words, host, count * sizeof(std::int64_t));
  PF_LAUNCH(store_payload<N>, (count + 255) / 256, 256, 0, stream, payload, device, count);
}

__global__ void write_chunks(MultiTensor table) {
  const TensorInfo& info = table.tensors[blockIdx.x];
  const std::int64_t count = info.numel == 0 ? 0 : (info.numel + info.shift + kChunk - 1) / kChunk;
  for (std::int64_t c = threadIdx.x; c < count; c += blockDim.x) {
    const_cast<Chunk*>(table.chunks)[info.first_chunk + c] = {static_cast<std::int32_t>(blockIdx.x),
                                                              static_cast<std::int32_t>(c)};
  }
}

}  // namespace

void upload_words(const std::int64_t* host, std::int64_t count, std::int64_t* device, cudaStream_t stream) {
  while (count > 0) {
    const int part = static_cast<int>(std::min<std::int64_t>(count, kLargePayload));
    if (part <= kSmallPayload) {
      upload<kSmallPayload>(host, part, device, stream);
    } else {
      upload<kLargePayload>(host, part, device, stream);
    }
    host += part, device += part, count -= part;
  }
}

void expand_chunks(const MultiTensor& table, cudaStream_t stream) {
  if (table.num_chunks == 0) return;
  PF_LAUNCH(write_chunks, static_cast<unsigned>(table.num_tensors), 128, 0, stream, table);
}

}  // namespace pecker_fast
