// Which table on the device serves a call, and what has to be sent for it. Free of torch headers; cuda_tables.h says
// why it is done so.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <utility>
#include <vector>

#include "table_spec.h"

namespace pecker_fast {

// Whose calls share a table: one device, one stream, one operator.
struct TableUser {
  std::int64_t device, stream, purpose;
};

// `Memory` owns words on the device.
template <typename Memory>
struct DeviceTable {
  MultiTensor view;
  void* scratch;
  // Of the table; of a captured call's dynamic pointers and scratch memory.
  Memory memory, own;
};

// Tables by their static part. Memory: default-constructible; copies share the words.
template <typename Memory>
class TableCache {
 public:
  // Most recently used ones are kept: the distinct calls of a training loop (parameter groups, kinds of steps).
  static constexpr std::size_t kCapacity = 32;

  // The table of a call, sent on `stream` as far as it is not there yet. allocate(words) returns Memory,
  // words_of(memory) their address.
  template <typename Allocate, typename WordsOf>
  DeviceTable<Memory> get(const TableSpec& spec, const TableUser& user, std::int64_t scratch_bytes, bool capturing,
                          cudaStream_t stream, const Allocate& allocate, const WordsOf& words_of) {
    const std::int64_t scratch_words = (scratch_bytes + 7) / 8;
    const auto use = [&](const Memory& memory) {
      std::int64_t* const words = words_of(memory);
      return DeviceTable<Memory>{spec.view(words), words + spec.table_words(), memory, {}};
    };
    const auto make = [&] {
      DeviceTable<Memory> table = use(allocate(spec.table_words() + scratch_words));
      upload_words(spec.words.data(), static_cast<std::int64_t>(spec.words.size()), words_of(table.memory), stream);
      expand_chunks(table.view, stream);
      return table;
    };
    std::vector<std::int64_t> key{user.device, spec.num_tensors, spec.slots, spec.dynamic_slots};
    const auto dynamic_begin = spec.words.begin() + spec.static_words();
    key.insert(key.end(), spec.words.begin(), dynamic_begin);
    const std::uint64_t hash = hash_words(key);
    const auto has_static_part = [&](const Entry& entry) { return entry.hash == hash && entry.key == key; };

    if (capturing) {
      const auto entry = std::find_if(entries_.begin(), entries_.end(), has_static_part);
      if (entry == entries_.end()) return make();
      entry->in_graph = true;
      // 16-byte alignment of the scratch memory.
      const std::int64_t dynamic_words = (spec.dynamic_words() + 1) / 2 * 2;
      DeviceTable<Memory> table{{}, nullptr, entry->memory, {}};
      if (dynamic_words + scratch_words > 0) table.own = allocate(dynamic_words + scratch_words);
      std::int64_t* const own = words_of(table.own);
      upload_words(spec.words.data() + spec.static_words(), spec.dynamic_words(), own, stream);
      table.view = spec.view(words_of(entry->memory), own);
      table.scratch = own + dynamic_words;
      return table;
    }

    const auto entry = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) {
      return entry.stream == user.stream && entry.purpose == user.purpose && entry.scratch_bytes == scratch_bytes &&
             has_static_part(entry);
    });
    if (entry == entries_.end()) {
      DeviceTable<Memory> table = make();
      entries_.push_front({hash, std::move(key), user.stream, user.purpose, scratch_bytes,
                           {dynamic_begin, spec.words.end()}, table.memory, false});
      drop_oldest();
      return table;
    }
    entries_.splice(entries_.begin(), entries_, entry);
    DeviceTable<Memory> table = use(entry->memory);
    if (!std::equal(dynamic_begin, spec.words.end(), entry->dynamic.begin())) {
      upload_words(&*dynamic_begin, spec.dynamic_words(), words_of(entry->memory) + spec.static_words(), stream);
      entry->dynamic.assign(dynamic_begin, spec.words.end());
    }
    return table;
  }

 private:
  struct Entry {
    std::uint64_t hash;
    std::vector<std::int64_t> key;
    std::int64_t stream, purpose, scratch_bytes;
    std::vector<std::int64_t> dynamic;
    Memory memory;
    bool in_graph;
  };

  static std::uint64_t hash_words(const std::vector<std::int64_t>& words) {
    std::uint64_t hash = 0x9e3779b97f4a7c15u;
    for (std::int64_t word : words) {
      hash = (hash ^ static_cast<std::uint64_t>(word)) * 0xff51afd7ed558ccdu;
      hash ^= hash >> 32;
    }
    return hash;
  }

  void drop_oldest() {
    const auto evictable = [](const Entry& entry) { return !entry.in_graph; };
    if (std::count_if(entries_.begin(), entries_.end(), evictable) <= static_cast<std::ptrdiff_t>(kCapacity)) return;
    const auto oldest = std::find_if(entries_.rbegin(), entries_.rend(), evictable);
    entries_.erase(std::next(oldest).base());
  }

  // Most recently used first.
  std::list<Entry> entries_;
};

}  // namespace pecker_fast
