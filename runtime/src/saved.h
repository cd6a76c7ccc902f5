// What a sequence knows of its first positions, as it is written to a file and read again, by this engine or another
// one of the same model: keys and values or latents, windows, recurrent states.
#pragma once

#include "engine_config.h"

namespace edge_moe {

// A piece of the device's memory.
struct SavedPiece {
  enum { kCache, kSnapshot, kState } of;  // a layer's cache, a layer's part in a snapshot of windows, a state buffer
  int layer;                              // of a state buffer: 0
  size_t at, bytes;                       // within it
};

// Calls piece(SavedPiece) for all pieces in an order that does not depend on the context or a step's length. windows:
// take them from a snapshot, for layers that have them there.
template <typename Piece>
void each_saved_piece(const EngineConfig& c, int positions, bool windows, const Piece& piece) {
  if (!positions) return;
  for (int layer = 0; layer < c.layers; ++layer) {
    const int window = c.attention(layer).sliding_window;
    const size_t block = kKeyBlock * c.kv_position_bytes(layer), row = c.kv_row_bytes(layer),
                 rows = c.pool_offset(layer);
    if (window) {
      const int count = int(c.window_blocks(layer));
      const int end = (positions - 1) / int(kKeyBlock) + 1, places = block ? int(row / block) : 0;
      const bool in_snapshot = windows && c.is_window(layer);
      size_t in = 0;
      for (size_t first = 0; first < rows; first += row)
        for (int i = std::max(0, end - count); i < end; ++i, in += block) {
          if (in_snapshot)
            piece(SavedPiece{SavedPiece::kSnapshot, layer, in, block});
          else
            piece(SavedPiece{SavedPiece::kCache, layer, first + i % places * block, block});
        }
    }
    c.each_kv_row(layer, positions, [&](size_t at, size_t bytes) {
      if (bytes && !(window && at < rows)) piece(SavedPiece{SavedPiece::kCache, layer, at, bytes});
    });
  }
  if (c.is_recurrent()) piece(SavedPiece{SavedPiece::kState, 0, 0, c.state_offsets().back()});
}

}  // namespace edge_moe
