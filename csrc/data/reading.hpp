// Many windows at once: where their tokens lie, and the tokens themselves. No torch, no CUDA, no Python.
//
//   locate_windows    find_pieces for many windows of one epoch
//   megatron_windows  the same for Megatron-LM's index
//   copy_windows      the tokens of located windows, converted into the rows of an array
//
// Memory is what all of this waits for, so whatever the next window or piece needs is asked for while this one is
// worked on. Values from files are checked where they are used: no input leads to a read or write outside the arrays.
#pragma once

#include <cstdint>
#include <vector>

#include "index_builder.hpp"

namespace hammer {

// A list of pieces for each window, one after the other.
struct Located {
  std::vector<Piece> pieces;
  std::vector<int64_t> counts;  // pieces of each window
};

// Tokens [offset, offset + count) of a permuted epoch for each offset; a window stops early at the end of the epoch.
template <class Length>
Located locate_windows(View<Length> lengths, View<int64_t> marks, int64_t stride, uint64_t key, View<int64_t> offsets,
                       int64_t count);

// Sample `window` is tokens [row window, row window + 1) of the stream of `documents`, and `extra` more. `document` of
// a piece stands for the sequence.
template <class Index>
Located megatron_windows(View<int32_t> lengths, View<int32_t> documents, View<Index> samples, View<int64_t> windows,
                         int64_t extra);

// Where the tokens are: piece.document is a sequence, or, where `boundaries` is not empty, a document whose first
// sequence boundaries[document] is. pointers[sequence] is the byte offset of a sequence in .bin.
struct Places {
  View<int64_t> pointers;
  View<int64_t> boundaries;
  int64_t item_size;
};

// Row rows[r] of `out` ([size, width]) becomes the tokens of the r-th window, which must be `width` in all.
template <class Token, class Out>
void copy_windows(const Token* tokens, int64_t num_tokens, const Places& places, View<int64_t> pieces,
                  View<int64_t> counts, View<int64_t> rows, int64_t width, int64_t size, Out* out);

}  // namespace hammer
