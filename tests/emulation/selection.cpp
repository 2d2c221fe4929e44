// C functions around the launchers of the selection, for tests/emulation/selection.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iterator>
#include <vector>

#include "cuda/select.h"
#include "cuda/select_state.cuh"

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

struct Table {
  std::vector<ScoreTensor> rows;
  std::vector<const void*> others;
  std::vector<std::int64_t> device;
  Scores scores = {};

  Table(int n, const std::int64_t* pointers, const std::int64_t* numels, const std::int64_t* types,
        const std::int64_t* other_pointers = nullptr, const float* damping = nullptr)
      : rows(n + 1) {
    for (int i = 0; i < n; ++i) {
      append_score(scores, i, reinterpret_cast<const void*>(pointers[i]), numels[i], static_cast<ScoreType>(types[i]),
                   &rows[scores.num_tensors]);
      if (damping != nullptr) others.push_back(reinterpret_cast<const void*>(other_pointers[i]));
    }
    scores.damping = damping;
  }

  // As the extension does before it calls a launcher.
  void upload(void* clear, std::int64_t clear_bytes) {
    const auto num_others = static_cast<std::int64_t>(others.size());
    device.resize(score_table_words(scores, num_others) + 1);
    upload_scores(scores, rows.data(), others.data(), num_others, device.data(), clear, clear_bytes, nullptr);
  }
};

// Aligned, and full of what must not matter.
struct Memory {
  explicit Memory(std::int64_t bytes) : words((bytes + 511) / 256 * 32, 0xc3c3c3c3c3c3c3c3ull) {}
  void* data() { return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(words.data()) + 255) / 256 * 256); }
  std::vector<u64> words;
};

}  // namespace

extern "C" {

const char* last_error() { return message; }

// The names of what was launched since the last call, with a space after each.
const char* launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : cuda_emulator::launched) names += name + " ";
  cuda_emulator::launched.clear();
  return names.c_str();
}

void set_order(int order) { cuda_emulator::order = static_cast<cuda_emulator::Order>(order); }

// What a selection takes beside scores and mask: bytes, rows of a group, candidates of a row; and whether it is
// sampled.
void selection_plan(int n, const std::int64_t* numels, const std::int64_t* types, std::int64_t rows,
                    const SelectTuning* tuning, std::int64_t* out) {
  const std::vector<std::int64_t> no_memory(n, 0);
  const Table table(n, no_memory.data(), numels, types);
  const SelectPlan plan = plan_select(table.scores, tuning == nullptr ? default_tuning(132) : *tuning, rows);
  const std::int64_t values[] = {select_workspace_bytes(table.scores, plan), plan.group, plan.capacity, plan.sampled};
  std::copy(std::begin(values), std::end(values), out);
}

// used[row]: 0 where the bracket held, 1 where the histograms decided, 2 where they were asked at once; -1 where the
// state is overwritten by that of later rows.
int emulated_select(int n, const std::int64_t* pointers, const std::int64_t* numels, const std::int64_t* types,
                    const std::int64_t* others, const float* damping, const std::int64_t* ks, std::int64_t rows,
                    int ties_all, const SelectTuning* tuning, std::int32_t* words, float* thresholds,
                    std::int64_t* counts, std::int64_t* nan_count, int* used) {
  return guarded([&] {
    Table table(n, pointers, numels, types, others, damping);
    const SelectPlan plan = plan_select(table.scores, *tuning, rows);
    Memory memory(select_workspace_bytes(table.scores, plan));
    table.upload(memory.data(), select_cleared_bytes(table.scores, plan, false));
    launch_select(table.scores, ks, rows, ties_all != 0, {words, thresholds, counts, nan_count}, plan, memory.data(),
                  nullptr);
    // The states of the last group of rows are the first part of the workspace.
    const RowState* states = static_cast<const RowState*>(memory.data());
    for (std::int64_t row = 0; row < rows; ++row) {
      const bool last = row / plan.group == (rows - 1) / plan.group;
      used[row] = !plan.sampled ? 2 : last ? states[row % plan.group].fallback : -1;
    }
  });
}

int emulated_threshold_mask(int n, const std::int64_t* pointers, const std::int64_t* numels, const std::int64_t* types,
                            const std::int64_t* others, const float* damping, const std::int32_t* keys,
                            const std::int64_t* tie_limits, std::int64_t rows, const SelectTuning* tuning,
                            std::int32_t* words, float* thresholds, std::int64_t* counts, std::int64_t* nan_count) {
  return guarded([&] {
    Table table(n, pointers, numels, types, others, damping);
    SelectTuning histograms = *tuning;
    histograms.min_sampled_bytes = INT64_MAX;
    const SelectPlan plan = plan_select(table.scores, histograms, rows);
    Memory memory(select_workspace_bytes(table.scores, plan));
    table.upload(memory.data(), select_cleared_bytes(table.scores, plan, true));
    launch_threshold_mask(table.scores, keys, tie_limits, rows, {words, thresholds, counts, nan_count}, plan,
                          memory.data(), nullptr);
  });
}

// WORD_BITS, PACK_BLOCK, INF_KEY and RADIX_BITS of pecker_fast/ops/layout.py.
void layout_constants(std::int64_t* out) {
  const std::int64_t values[] = {kWordBits, kPackBlock, kInfKey, kRadixBits[0], kRadixBits[1], kRadixBits[2]};
  std::copy(std::begin(values), std::end(values), out);
}

int emulated_radix_histogram(int n, const std::int64_t* pointers, const std::int64_t* numels, const std::int64_t* types,
                             const std::int64_t* others, const float* damping, const std::int32_t* prefixes,
                             std::int64_t rows, int level, int blocks, std::int64_t* counts) {
  return guarded([&] {
    Table table(n, pointers, numels, types, others, damping);
    table.upload(counts, rows * static_cast<std::int64_t>(sizeof(std::int64_t)) << kRadixBits[level]);
    launch_radix_histogram(table.scores, prefixes, rows, level, counts, blocks, nullptr);
  });
}

int emulated_magnitude_sums(int n, const std::int64_t* pointers, const std::int64_t* numels, const std::int64_t* types,
                            int blocks, std::int64_t* sums) {
  return guarded([&] {
    Table table(n, pointers, numels, types);
    table.upload(sums, n * kSumColumns * static_cast<std::int64_t>(sizeof(std::int64_t)));
    launch_magnitude_sums(table.scores, sums, blocks, nullptr);
  });
}

}  // extern "C"
