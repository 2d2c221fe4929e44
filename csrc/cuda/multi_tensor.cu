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

constexpr int kUploadThreads = 256;
// Blocks that clear memory, each at least 16 words a thread.
constexpr std::int64_t kMostClearBlocks = 512;

template <int N>
__global__ void store_payload(const __grid_constant__ Payload<N> payload, std::int64_t* device, int count,
                              std::int64_t* clear, std::int64_t clear_words) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) device[i] = payload.words[i];
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t word = i; word < clear_words; word += stride) clear[word] = 0;
}

template <int N>
void upload(const std::int64_t* host, int count, std::int64_t* device, cudaStream_t stream, std::int64_t* clear,
            std::int64_t clear_words) {
  Payload<N> payload;
  if (count > 0) std::memcpy(payload.words, host, count * sizeof(std::int64_t));
  const std::int64_t clear_blocks = std::min(kMostClearBlocks, clear_words / (16 * kUploadThreads) + (clear_words > 0));
  const std::int64_t blocks = std::max<std::int64_t>((count + kUploadThreads - 1) / kUploadThreads, clear_blocks);
  PF_LAUNCH(store_payload<N>, static_cast<unsigned>(blocks), kUploadThreads, 0, stream, payload, device, count, clear,
            clear_words);
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

void upload_words(const std::int64_t* host, std::int64_t count, std::int64_t* device, cudaStream_t stream,
                  std::int64_t* clear, std::int64_t clear_words) {
  while (count > 0 || clear_words > 0) {
    const int part = static_cast<int>(std::min<std::int64_t>(count, kLargePayload));
    if (part <= kSmallPayload) {
      upload<kSmallPayload>(host, part, device, stream, clear, clear_words);
    } else {
      upload<kLargePayload>(host, part, device, stream, clear, clear_words);
    }
    host += part, device += part, count -= part;
    clear_words = 0;
  }
}

void expand_chunks(const MultiTensor& table, cudaStream_t stream) {
  if (table.num_chunks == 0) return;
  PF_LAUNCH(write_chunks, static_cast<unsigned>(table.num_tensors), 128, 0, stream, table);
}

}  // namespace pecker_fast
