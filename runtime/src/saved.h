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
    const bool has_window = c.attention(layer).sliding_window;
    if (has_window) {
      const bool in_snapshot = windows && c.is_window(layer);
      const auto of = in_snapshot ? SavedPiece::kSnapshot : SavedPiece::kCache;
      c.each_window_block(layer, positions, [&](size_t place, size_t at, size_t bytes) {
        piece(SavedPiece{of, layer, in_snapshot ? at : place, bytes});
      });
    }
    c.each_kv_row(layer, positions, [&](size_t at, size_t bytes) {
      if (bytes && !(has_window && at < c.pool_offset(layer))) piece(SavedPiece{SavedPiece::kCache, layer, at, bytes});
    });
  }
  if (c.is_recurrent()) piece(SavedPiece{SavedPiece::kState, 0, 0, c.state_offsets().back()});
}

}  // namespace edge_moe
