// Python bindings of the bundle formats: constants and codecs of format.h, and record layouts.
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <utility>

#include "checksum.h"
#include "format.h"
#include "python/arrays.h"
#include "python/encodings.h"

using namespace edge_moe;

Encoding encoding_of(const EncodingTuple& encoding) {
  const auto& [name, width, group] = encoding;
  for (const CodecTraits& codec : kCodecs) {
    if (codec.name != name) continue;
    expect(width >= 0 && width < 64 && codec.widths >> width & 1,
           "codec " + name + " has no width " + std::to_string(width));
    if (!codec.largest_group) return {codec.codec, width, 0};
    expect(std::find(std::begin(kGroups), std::end(kGroups), group) != std::end(kGroups),
           "group must be 32, 64 or 128");
    expect(group <= codec.largest_group,
           "the group of codec " + name + " must be at most " + std::to_string(codec.largest_group));
    return {codec.codec, width, group};
  }
  throw std::invalid_argument("no codec '" + name + "'");
}

namespace {

using Encodings = std::array<EncodingTuple, kProjections>;
using Places = std::map<std::string, std::pair<uint64_t, uint64_t>>;  // (offset, bytes) by name

std::array<Encoding, kProjections> encodings_of(const Encodings& given) {
  std::array<Encoding, kProjections> encodings;
  for (int p = 0; p < kProjections; ++p) encodings[p] = encoding_of(given[p]);
  return encodings;
}

// Call f(name, place) for each part of the layout, in the order of format.h.
template <typename Layout, typename F>
void each_part(Layout& layout, const F& f) {
  for (int p = 0; p < kProjections; ++p)
    for (int part = 0; part < kParts; ++part)
      if (auto& place = layout.matrices[p].parts[part]; place.bytes)
        f(kProjectionNames[p] + std::string(".") + kPartNames[part], place);
  for (int p = 0; p < kProjections; ++p)
    if (auto& place = layout.matrices[p].output_bias; place.bytes)
      f(kProjectionNames[p] + std::string(".output_bias"), place);
}

// The layout with its parts moved to `places`.
RecordLayout placed(RecordLayout layout, const Places& places) {
  std::vector<Place> taken;
  each_part(layout, [&](const std::string& name, Place& place) {
    const auto found = places.find(name);
    expect(found != places.end(), "part " + name + " is missing");
    const auto [offset, bytes] = found->second;
    expect(bytes == place.bytes,
           "part " + name + " has " + std::to_string(bytes) + " bytes, expected " + std::to_string(place.bytes));
    expect(offset % kPartAlignment == 0 && offset < uint64_t(1) << 40,
           "part " + name + " begins at byte " + std::to_string(offset) + ", expected a multiple of 64");
    place.offset = offset;
    taken.push_back(place);
  });
  expect(taken.size() == places.size(), "there are parts that the codecs do not have");
  std::sort(taken.begin(), taken.end(), [](const Place& a, const Place& b) { return a.offset < b.offset; });
  for (size_t i = 1; i < taken.size(); ++i)
    expect(taken[i - 1].offset + taken[i - 1].bytes <= taken[i].offset, "parts overlap");
  layout.bytes = align_up(taken.back().offset + taken.back().bytes, kPartAlignment);
  return layout;
}

}  // namespace

void bind_format(nb::module_& m) {
  m.attr("FORMAT_VERSION") = kFormatVersion;
  m.attr("PART_ALIGNMENT") = kPartAlignment;
  m.attr("DATA_ALIGNMENT") = kDataAlignment;
  m.attr("SMALL_ALIGNMENT") = kSmallAlignment;
  nb::list widths, groups;
  for (int width : kWidths) widths.append(width);
  for (int group : kGroups) groups.append(group);
  m.attr("WIDTHS") = nb::tuple(widths);
  m.attr("GROUPS") = nb::tuple(groups);
  nb::dict codecs;
  for (const CodecTraits& codec : kCodecs) {
    nb::list parts, its_widths, its_groups, dtypes;
    for (int part = 0; part < codec.parts; ++part) {
      parts.append(kPartNames[part]);
      dtypes.append(part == kCodes ? codec.dtype : codec.scale_dtype);
    }
    for (int group : kGroups)
      if (group <= codec.largest_group) its_groups.append(group);
    for (int width = 0; width < 64; ++width)
      if (codec.widths >> width & 1) its_widths.append(width);
    codecs[codec.name] =
        nb::make_tuple(nb::tuple(its_widths), nb::tuple(parts), nb::tuple(dtypes), nb::tuple(its_groups));
  }
  m.attr("CODECS") = codecs;

  m.attr("ROW_CHECKSUM") = kRowChecksum;
  m.def(
      "row_layout",
      [](const EncodingTuple& encoding, int cols) {
        const RowLayout layout = row_layout(encoding_of(encoding), cols);
        std::map<std::string, std::pair<size_t, size_t>> parts;
        for (int part = 0; part < kParts; ++part)
          if (const Place& place = layout.row.parts[part]; place.bytes)
            parts[kPartNames[part]] = {place.offset, place.bytes};
        return std::pair(layout.bytes, parts);
      },
      nb::arg("encoding"), nb::arg("cols"),
      "The layout of one row of a table: its bytes, the checksum at their end included, and the (offset, bytes) of\n"
      "each part. encoding: (codec, width, group).");
  m.def(
      "row_checksums",
      [](ArrayIn<uint8_t, 2> rows, int64_t first) {
        std::vector<uint32_t> sums(rows.shape(0));
        for (size_t i = 0; i < sums.size(); ++i)
          sums[i] = row_checksum(rows.data() + i * rows.shape(1), rows.shape(1), first + int64_t(i));
        return to_numpy(std::move(sums), {rows.shape(0)});
      },
      nb::arg("rows"), nb::arg("first"),
      "The checksums, uint32 (rows,), that rows of a table, uint8 (rows, bytes), should end with. first: the number "
      "of\n"
      "the first one.");

  nb::class_<RecordLayout>(m, "RecordLayout", "Where the parts of one expert lie in its record.")
      .def(
          "__init__",
          [](RecordLayout* self, int dim, int hidden, const Encodings& encodings, bool biased, bool gated) {
            expect(dim > 0 && hidden > 0, "dim and hidden must be at least 1");
            new (self) RecordLayout(record_layout(dim, hidden, encodings_of(encodings), biased, gated));
          },
          nb::arg("dim"), nb::arg("hidden"), nb::arg("encodings"), nb::arg("biased") = false, nb::arg("gated") = true,
          "The layout of records in new bundles. encodings: (codec, width, group) of gate, up and down. biased: with\n"
          "output biases. gated: with gates. Raises ValueError for an unknown encoding.")
      .def(
          "placed", [](const RecordLayout& self, const Places& parts) { return placed(self, parts); }, nb::arg("parts"),
          "The same with its parts in other places: (offset, bytes) by name. Raises ValueError unless these are all\n"
          "parts, at multiples of 64 bytes, without overlaps.")
      .def_ro("bytes", &RecordLayout::bytes, "Bytes of all parts, without the padding of the record.")
      .def_prop_ro(
          "parts",
          [](const RecordLayout& self) {
            nb::dict parts;
            each_part(self, [&](const std::string& name, const Place& place) {
              parts[name.c_str()] = nb::make_tuple(place.offset, place.bytes);
            });
            return parts;
          },
          nb::sig("def parts(self) -> dict[str, tuple[int, int]]"),
          "(offset, bytes) by name, like \"gate.codes\", in the order of new bundles.");
}
