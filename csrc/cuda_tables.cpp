#include "cuda_tables.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <list>
#include <vector>

namespace pecker_fast {
namespace {

// Distinct steps of a training loop (parameter groups, retain and forget phases) that find their tables again.
constexpr std::size_t kTablesKept = 32;

struct Kept {
  std::uint64_t hash;
  std::vector<std::int64_t> key;
  std::vector<std::int64_t> dynamic;
  at::Tensor storage;
};

struct Cache {
  std::mutex mutex;
  // Most recently used first.
  std::list<Kept> tables;
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
  Cache& kept = cache();
  table.lock = std::unique_lock<std::mutex>(kept.mutex);
  const auto found = std::find_if(kept.tables.begin(), kept.tables.end(),
                                  [&](const Kept& other) { return other.hash == hash && other.key == key; });
  if (found == kept.tables.end()) {
    make();
    kept.tables.push_front({hash, std::move(key), {dynamic_begin, spec.words.end()}, table.storage});
    if (kept.tables.size() > kTablesKept) kept.tables.pop_back();
    return table;
  }
  kept.tables.splice(kept.tables.begin(), kept.tables, found);
  std::int64_t* const words = use(found->storage);
  if (!std::equal(dynamic_begin, spec.words.end(), found->dynamic.begin())) {
    upload_words(&*dynamic_begin, spec.dynamic_slots * spec.num_tensors, words + static_words, table.stream);
    found->dynamic.assign(dynamic_begin, spec.words.end());
  }
  return table;
}

}  // namespace pecker_fast
