// sentencepiece-BPE ids, exactly those of sentencepiece, by cutting, remembering and joining; on several threads.
//
//     document --write_text--> UTF-8 --cut--> segments --caches--> ids         (most segments have been met before)
//                                                 |                 ^
//                                                 +------join-------+          (the others)
//
// 1. cut (worker.cpp, `encode`): wherever a cut is safe, as vocabulary.hpp defines it. A user-defined symbol is a
//    segment of its own.
// 2. caches (`look_up`): segments of up to 15 bytes and 4 ids lie in a table of fixed size, two of them in a line of
//    memory. All lines of a batch are asked for before the first is read, so that waiting for memory overlaps. A new
//    segment takes the second place of its line and moves to the first when it is met again: rare segments replace each
//    other. A second, smaller table holds segments of up to 38 bytes and 6 ids.
// 3. join (`join_segment`): the published algorithm over (symbol, symbol) -> piece.
//
// Documents are spread over threads in jobs; a long document is divided at cuts that are safe whatever stands before
// them, so one huge document uses all threads, too. A thread's caches live on from call to call.
//
// Memory: 4 bytes an id, twice at the end of a call with several threads (their parts, and the array that gathers
// them); tables of about 5 MB for 105,789 pieces, and 9 MB a thread; some 50 bytes a character of the longest segment,
// which in text is a line of one repeated character.

#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "vocabulary.hpp"
#include "worker.hpp"

namespace hammer {

// A document as Python holds it: characters of 1, 2 or 4 bytes.
struct Text {
  const void* data;
  size_t length;  // characters
  int width;  // bytes of a character
  bool ascii;
};

// Half of a surrogate pair in a text: no Unicode, so no ids.
struct Surrogate {};

// The ids of a call, one document after the other, as the parts that the threads made.
struct Encoded {
  struct Part {
    size_t buffer, offset, count;
  };
  std::vector<int64_t> lengths;  // ids of each document
  std::vector<Part> parts;
  std::vector<Ids> buffers;

  size_t total() const;
  void gather(int32_t* out) const;
};

class Encoder {
 public:
  // Throws DamagedModel. The model must be one that Vocabulary supports.
  explicit Encoder(const Model& model);

  // `first` and `last` go around the ids of every document that has any; negative: nothing does. Throws Surrogate.
  // `continued`: the texts are what stands behind a cut, so no dummy prefix goes before them.
  Encoded encode(const std::vector<Text>& texts, int threads, int32_t first, int32_t last, bool continued = false);

  // For a text that comes in parts: where it can be cut (the next place from `from` on, else its length), and
  // whether what stands behind a cut can be encoded (`continued`) without what stands before it.
  size_t safe_cut(const Text& text, size_t from) const;
  bool parts_are_independent() const { return !remove_extra_whitespaces_; }

 private:
  // A document or a part of it.
  struct Task {
    size_t document, begin, end;  // characters
  };
  std::vector<Task> divide(const std::vector<Text>& texts) const;
  void run(const Task& task, const Text& text, bool prefix, Worker& worker, std::vector<char>& scratch, Ids& out) const;
  std::unique_ptr<Worker> borrow_worker();
  void return_worker(std::unique_ptr<Worker> worker);

  const Vocabulary vocabulary_;
  const bool add_dummy_prefix_, remove_extra_whitespaces_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> idle_;  // with the caches that they have filled
};

}  // namespace hammer
