// C functions around the launchers of the streaming kernels, for tests/emulation/streaming.py. Tables are made as the
// extension makes them.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <string>

#include "cuda/adam.h"
#include "cuda/packing.h"
#include "cuda/pointwise.h"
#include "cuda/table_cache.h"

using namespace pecker_fast;

namespace {

char message[512];

template <typename Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
    return 1;
  }
}

struct HostTable {
  std::vector<std::int64_t> storage;
  MultiTensor view;
};

// pointers[slot * n + i]; tensors are aligned by their pointer in `leading_slot` (-1: no shift).
TableSpec make_spec(int n, const std::int64_t* numels, const std::int64_t* word_offsets, const int* types,
                    const std::int64_t* pointers, int slots, int dynamic_slots, int leading_slot,
                    const int* leading_sizes) {
  TableSpec spec(n, slots, dynamic_slots);
  for (int i = 0; i < n; ++i) {
    const std::int64_t leading = leading_slot < 0 ? 0 : pointers[leading_slot * n + i];
    spec.set_tensor(i, numels[i], word_offsets[i], static_cast<ElementType>(types[i]),
                    reinterpret_cast<const void*>(leading), leading_slot < 0 ? 1 : leading_sizes[i]);
    for (int slot = 0; slot < slots; ++slot) {
      spec.set_pointer(slot, i, reinterpret_cast<const void*>(pointers[slot * n + i]));
    }
  }
  return spec;
}

HostTable make_table(int n, const std::int64_t* numels, const std::int64_t* word_offsets, const int* types,
                       const std::int64_t* pointers, int slots, int leading_slot, const int* leading_sizes) {
  const TableSpec spec = make_spec(n, numels, word_offsets, types, pointers, slots, 0, leading_slot, leading_sizes);
  HostTable table{std::vector<std::int64_t>(spec.table_words(), -1), {}};
  table.view = spec.view(table.storage.data());
  upload_words(spec.words.data(), static_cast<std::int64_t>(spec.words.size()), table.storage.data(), nullptr);
  expand_chunks(table.view, nullptr);
  return table;
}

}  // namespace

extern "C" {

const char* last_error() { return message; }

void set_order(int order) { cuda_emulator::order = static_cast<cuda_emulator::Order>(order); }

void set_approximate(int approximate) { cuda_emulator::approximate = approximate != 0; }

int emulated_accumulate(int n, const std::int64_t* numels, const std::int64_t* offsets, const int* types,
                        const int* sizes, const std::int64_t* pointers, int reduction) {
  return guarded([&] {
    HostTable table = make_table(n, numels, offsets, types, pointers, kAccumulateSlots, 0, sizes);
    accumulate(table.view, static_cast<Reduction>(reduction), nullptr);
  });
}

int emulated_apply_mask(int n, const std::int64_t* numels, const std::int64_t* offsets, const int* types,
                        const int* sizes, const std::int64_t* pointers, const std::uint32_t* words) {
  return guarded([&] {
    HostTable table = make_table(n, numels, offsets, types, pointers, kApplyMaskSlots, 0, sizes);
    apply_mask(table.view, words, nullptr);
  });
}

int emulated_count_nonfinite(int n, const std::int64_t* numels, const std::int64_t* offsets, const int* types,
                             const int* sizes, const std::int64_t* pointers, int leading_slot,
                             const std::uint32_t* words, int joint, const float* grad_scale, std::int64_t* total) {
  return guarded([&] {
    HostTable table = make_table(n, numels, offsets, types, pointers, kNonfiniteSlots, leading_slot, sizes);
    count_nonfinite(table.view, static_cast<ElementType>(n > 0 ? types[0] : 0), words, joint != 0, grad_scale,
                    reinterpret_cast<unsigned long long*>(total), nullptr);
  });
}

int emulated_block_counts(int n, const std::int64_t* numels, const std::int64_t* offsets, const int* types,
                          const std::uint32_t* words, std::int64_t* counts) {
  return guarded([&] {
    HostTable table = make_table(n, numels, offsets, types, nullptr, 0, -1, nullptr);
    block_counts(table.view, words, counts, nullptr);
  });
}

int emulated_pack(const void* dense, int size, const std::uint32_t* words, std::int64_t numel, void* packed,
                  std::int64_t count) {
  return guarded([&] {
    std::vector<std::int64_t> offsets(block_count(numel) + 1, -1);
    block_offsets(words, numel, offsets.data(), nullptr);
    pack(dense, size, words, numel, offsets.data(), packed, count, nullptr);
  });
}

int emulated_unpack(const void* packed, int size, std::int64_t count, const std::uint32_t* words, std::int64_t numel,
                    void* dense) {
  return guarded([&] {
    std::vector<std::int64_t> offsets(block_count(numel) + 1, -1);
    block_offsets(words, numel, offsets.data(), nullptr);
    unpack(packed, size, count, words, numel, offsets.data(), dense, nullptr);
  });
}

struct AdamOptions {
  const std::uint32_t* words;
  const std::int64_t* packed_offsets;
  const void* bias_table;
  const float* steps;
  const double* lr;
  const float* grad_scale;
  const float* found_inf;
  std::int64_t last_bias_row, seed;
  double beta1, beta2, eps, weight_decay, clip_value, max_update, ema_decay;
  int decoupled, maximize, retain, zero_nonfinite, ema_everywhere, stochastic, joint, counts_are_16_bit, rare;
  int packed_grads, packed_values;
};

}  // extern "C"

namespace {

// The two launches of a step.
void run_adam(int n, const int* types, const std::int64_t* pointers, const AdamOptions* o, const MultiTensor& table,
              void* scratch) {
  const auto run = [&](auto compute, auto param) {
    using T = decltype(compute);
    using P = decltype(param);
    const AdamDeviceScalars device{o->steps, o->lr,    o->grad_scale,   o->found_inf,      o->beta1,
                                   o->beta2, o->weight_decay, o->max_update, o->decoupled != 0, o->maximize != 0,
                                   o->seed};
    prepare_adam<T>(device, table, scratch, nullptr);
    AdamArguments<T> a{};
    a.table = table;
    a.scratch = scratch;
    a.words = o->words;
    a.packed_offsets = o->packed_offsets;
    a.bias_table = static_cast<const T*>(o->bias_table);
    a.last_bias_row = static_cast<std::int32_t>(o->last_bias_row);
    set_adam_scalars<T>(a, o->beta1, o->beta2, o->eps, o->decoupled ? 0.0 : o->weight_decay, o->clip_value,
                        o->max_update, o->ema_decay, o->zero_nonfinite != 0);
    const auto has = [&](AdamSlot slot) {
      return std::any_of(pointers + slot * n, pointers + (slot + 1) * n, [](std::int64_t p) { return p != 0; });
    };
    a.packed_grads = o->packed_grads;
    a.packed_values = o->packed_values;
    a.has_first_moment = has(kExpAvg);
    a.has_ema = has(kEma);
    a.joint = o->joint;
    a.retain_variance = o->retain;
    a.ema_everywhere = o->ema_everywhere;
    a.stochastic_rounding = o->stochastic;
    a.counts_are_16_bit = o->counts_are_16_bit;
    a.rare = o->rare;
    adam_step<P, T>(a, nullptr);
  };
  switch (n > 0 ? types[0] : -1) {
    case kF32:
      return run(0.0f, 0.0f);
    case kBF16:
      return run(0.0f, bf16{});
    case kFP16:
      return run(0.0f, fp16{});
    case kF64:
      return run(0.0, 0.0);
  }
}

using Words = std::shared_ptr<std::vector<std::int64_t>>;

TableCache<Words> cache;

// A captured step.
struct Graph {
  std::vector<std::function<void()>> nodes;
  DeviceTable<Words> table;
} graph;

DeviceTable<Words> cached_table(const TableSpec& spec, bool capturing, std::int64_t scratch_bytes) {
  // Captured and other steps are on different streams.
  const TableUser user{0, capturing, 0};
  return cache.get(
      spec, user, scratch_bytes, capturing, nullptr,
      [](std::int64_t words) { return std::make_shared<std::vector<std::int64_t>>(words, -1); },
      [](const Words& words) { return words == nullptr ? nullptr : words->data(); });
}

}  // namespace

extern "C" {

int emulated_adam(int n, const std::int64_t* numels, const std::int64_t* offsets, const int* types, const int* sizes,
                  const std::int64_t* pointers, const AdamOptions* o) {
  return guarded([&] {
    HostTable table = make_table(n, numels, offsets, types, pointers, kAdamSlots, kParam, sizes);
    std::vector<std::int64_t> scratch(adam_scratch_bytes(n) / 8 + 1, -1);
    run_adam(n, types, pointers, o, table.view, scratch.data());
  });
}

// With the extension's cache of tables. capture: the launches are recorded instead of run.
int emulated_cached_adam(int n, const std::int64_t* numels, const std::int64_t* offsets, const int* types,
                         const int* sizes, const std::int64_t* pointers, const AdamOptions* o, int capture) {
  return guarded([&] {
    const TableSpec spec =
        make_spec(n, numels, offsets, types, pointers, kAdamSlots, kAdamDynamicSlots, kParam, sizes);
    if (capture) graph.nodes.clear();
    cuda_emulator::capture = capture ? &graph.nodes : nullptr;
    const DeviceTable<Words> table = cached_table(spec, capture != 0, adam_scratch_bytes(n));
    run_adam(n, types, pointers, o, table.view, table.scratch);
    cuda_emulator::capture = nullptr;
    if (capture) graph.table = table;
  });
}

// Runs the recorded step.
int replay() {
  return guarded([&] {
    for (const auto& node : graph.nodes) node();
  });
}

void forget_tables() {
  cache = {};
  graph = {};
}

// Kernels must not read the memory between two addresses; none is forbidden from now on if both are 0.
void forbid_reads(std::int64_t begin, std::int64_t end) {
  if (begin == end) return cuda_emulator::unreadable.clear();
  cuda_emulator::unreadable.emplace_back(reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end));
}

// The names of what was launched since the last call, with a space after each.
const char* launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : cuda_emulator::launched) names += name + " ";
  cuda_emulator::launched.clear();
  return names.c_str();
}

}  // extern "C"
