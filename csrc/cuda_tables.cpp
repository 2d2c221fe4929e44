#include "cuda_tables.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <list>
#include <vector>

namespace pecker_fast {
namespace {

// Number of distinct calls of a training loop (parameter groups, kinds of steps) whose tables stay cached.
constexpr std::size_t kCachedTables = 32;

struct CachedTable {
  std::uint64_t hash;
  std::vector<std::int64_t> key;
  std::vector<std::int64_t> dynamic;
  at::Tensor storage;
};

struct Cache {
  std::mutex mutex;
  // Most recently used first.
  std::list<CachedTable> list;
};

Cache& cache() {
  // Never destroyed: the CUDA context is gone by the time static objects are.
  static Cache* const instance = new Cache;
  return *instance;
}

std::uint64_t hash_words(const std::vector<std::int64_t>& words) {
  std::uint64_t hash = 0x9e3779b97f4a7c15u;
  for (std::int64_t word : words) {
    hash = (hash ^ static_cast<std::uint64_t>(word)) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  }
  return hash;
}

// Sets the maximum of bytes that a read from DRAM fetches on the current device (0: no change); returns the setting.
std::int64_t l2_fetch_granularity(std::int64_t bytes) {
  if (bytes > 0) C10_CUDA_CHECK(cudaDeviceSetLimit(cudaLimitMaxL2FetchGranularity, static_cast<std::size_t>(bytes)));
  std::size_t now = 0;
  C10_CUDA_CHECK(cudaDeviceGetLimit(&now, cudaLimitMaxL2FetchGranularity));
  return static_cast<std::int64_t>(now);
}

TORCH_LIBRARY_FRAGMENT(pecker_fast, m) { m.def("l2_fetch_granularity", &l2_fetch_granularity); }

}  // namespace

Table device_table(const TableSpec& spec, int purpose, std::int64_t scratch_bytes) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  TORCH_CHECK_VALUE(spec.total_chunks <= INT32_MAX, "a call works on at most ", INT32_MAX, " chunks of ", kChunk,
                    " entries, got ", spec.total_chunks);
  const std::int64_t static_words = chunks_at(spec.num_tensors, spec.slots - spec.dynamic_slots);
  const auto dynamic_begin = spec.words.begin() + static_words;
  const std::int64_t scratch_at = spec.table_words();

  Table table{};
  table.stream = stream.stream();
  const auto use = [&](const at::Tensor& storage) {
    auto* const words = static_cast<std::int64_t*>(storage.mutable_data_ptr());
    table.storage = storage;
    table.view = view_table(words, spec.num_tensors, spec.slots, spec.total_chunks);
    table.scratch = words + scratch_at;
    return words;
  };
  const auto make = [&] {
    const auto options = at::TensorOptions().dtype(at::kLong).device(at::kCUDA, stream.device_index());
    const std::int64_t size = scratch_at + (scratch_bytes + 7) / 8;
    auto* const words = use(scratch_bytes > 0 ? at::zeros({size}, options) : at::empty({size}, options));
    upload_words(spec.words.data(), static_cast<std::int64_t>(spec.words.size()), words, table.stream);
    expand_chunks(table.view, table.stream);
  };
  if (capturing) {
    make();
    return table;
  }

  std::vector<std::int64_t> key{stream.device_index(), static_cast<std::int64_t>(stream.id()), purpose, scratch_bytes,
                                spec.num_tensors,      spec.slots,                             spec.dynamic_slots};
  key.insert(key.end(), spec.words.begin(), dynamic_begin);
  const std::uint64_t hash = hash_words(key);
  Cache& tables = cache();
  table.lock = std::unique_lock<std::mutex>(tables.mutex);
  const auto entry = std::find_if(tables.list.begin(), tables.list.end(),
                                  [&](const CachedTable& other) { return other.hash == hash && other.key == key; });
  if (entry == tables.list.end()) {
    make();
    tables.list.push_front({hash, std::move(key), {dynamic_begin, spec.words.end()}, table.storage});
    if (tables.list.size() > kCachedTables) tables.list.pop_back();
    return table;
  }
  tables.list.splice(tables.list.begin(), tables.list, entry);
  std::int64_t* const words = use(entry->storage);
  if (!std::equal(dynamic_begin, spec.words.end(), entry->dynamic.begin())) {
    upload_words(&*dynamic_begin, spec.dynamic_slots * spec.num_tensors, words + static_words, table.stream);
    entry->dynamic.assign(dynamic_begin, spec.words.end());
  }
  return table;
}

}  // namespace pecker_fast
