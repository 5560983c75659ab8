// The launch table and the code objects behind this library's own end, read once (table.py and
// objects.py say what the lines mean). The compiler appends them to the host library, which is the
// same file for every model.
#pragma once
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "sinterlm/arena.h"
#include "sinterlm/error.h"

namespace slg {

using sl::fail;

// Tokens, sampled rows, sequences, and tokens whose hidden states are given out, of a step.
struct Sizes {
  int T, R, S, N = 0;
  int of(char unit) const {
    return unit == 'T' ? T : unit == 'R' ? R : unit == 'S' ? S : unit == 'N' ? N : 1;
  }
  bool operator<(const Sizes& o) const {
    return std::tie(T, R, S, N) < std::tie(o.T, o.R, o.S, o.N);
  }
};

struct Axis {
  char unit = '1';
  int per = 1, times = 1;
  bool plus_seqs = false;
  unsigned count(const Sizes& s) const {
    return unsigned(s.of(unit) + per - 1) / per * times + (plus_seqs ? s.S : 0);
  }
};

struct Buffer {
  std::string name;
  char unit;
  int64_t bytes, offset;
};

struct Kernel {
  std::string name, symbol;
  Axis grid[3];
  int warps = 0;
  unsigned shared = 0;
  const char* code = nullptr;
  int N = 0, K = 0, pitch = 0;  // of the vendor's GEMM, which has no code
  bool is_vendor() const { return N > 0; }
};

constexpr int kLeftOut = -1;  // the kernel of a choice that leaves the launch out

struct Launch {
  std::string slot;
  int layer;
  std::vector<std::string> args;
};

struct Choice {
  std::string slot;
  char unit;
  int most;
  bool decode;
  int kernel;
  bool fits(const Sizes& s, bool is_decode) const {
    return (most == 0 || s.of(unit) <= most) && (!decode || is_decode);
  }
};

struct Table {
  std::string device;
  std::map<std::string, uint64_t> facts;
  std::vector<Buffer> buffers;
  std::vector<Kernel> kernels;
  std::vector<Launch> launches;
  std::vector<Choice> choices;
  sl::Arena file;  // what `code` of kernels points into

  int fact(const char* name) const { return static_cast<int>(facts.at(name)); }
  int64_t arena_bytes(char unit) const {
    int64_t most = 0;
    for (const Buffer& b : buffers)
      if (b.unit == unit) most = std::max(most, b.offset + b.bytes);
    return most;
  }
};

// Last bytes of the file: where the table begins, and this.
constexpr char kTrailer[] = "sinterlm-launch-table";
constexpr int64_t kTrailerBytes = 32;  // of which 8 are the offset, little-endian

inline bool parse_axis(const std::string& text, Axis* axis) {
  char plus = 0, seqs = 0;
  const int n =
      sscanf(text.c_str(), "%c/%d*%d%c%c", &axis->unit, &axis->per, &axis->times, &plus, &seqs);
  axis->plus_seqs = n == 5 && plus == '+' && seqs == 'S';
  return (n == 3 || axis->plus_seqs) && axis->per > 0 && axis->times > 0 &&
         std::strchr("TRSN1", axis->unit);
}

// One line; false where it is none of ours.
inline bool parse_line(const std::string& line, const char* body, Table* t) {
  std::istringstream in(line);
  std::string noun, unit, kind, axes[3];
  in >> noun;
  if (noun == "device") return bool(in >> t->device);
  if (noun == "fact") {
    std::string name;
    return bool(in >> name >> t->facts[name]);
  }
  if (noun == "buffer") {
    Buffer b;
    if (!(in >> b.name >> unit >> b.bytes >> b.offset)) return false;
    b.unit = unit[0];
    t->buffers.push_back(b);
    return true;
  }
  if (noun == "kernel") {
    size_t id;
    Kernel k;
    if (!(in >> id >> k.name >> axes[0] >> axes[1] >> axes[2]) || id != t->kernels.size())
      return false;
    for (int i = 0; i < 3; ++i)
      if (!parse_axis(axes[i], &k.grid[i])) return false;
    t->kernels.push_back(k);
    return true;
  }
  if (noun == "launch") {
    Launch launch;
    if (!(in >> launch.slot >> launch.layer)) return false;
    for (std::string arg; in >> arg;) launch.args.push_back(arg);
    t->launches.push_back(launch);
    return true;
  }
  if (noun == "choice") {
    Choice c;
    if (!(in >> c.slot >> unit >> c.most >> kind >> c.kernel)) return false;
    c.unit = unit[0];
    c.decode = kind == "decode";
    t->choices.push_back(c);
    return c.kernel == kLeftOut || (c.kernel >= 0 && size_t(c.kernel) < t->kernels.size());
  }
  if (noun == "product") {
    size_t id;
    if (!(in >> id) || id >= t->kernels.size()) return false;
    Kernel& k = t->kernels[id];
    return bool(in >> k.N >> k.K >> k.pitch) && k.N > 0 && k.K > 0 && k.pitch >= k.K;
  }
  if (noun == "object") {
    size_t id;
    int64_t offset;
    std::string symbol;
    if (!(in >> id >> symbol) || id >= t->kernels.size()) return false;
    Kernel& k = t->kernels[id];
    k.symbol = symbol;
    if (!(in >> k.warps >> k.shared >> offset)) return false;
    k.code = body + offset;
    return true;
  }
  return noun == kTrailer;  // the heading
}

inline sl_status parse_table(const char* text, int64_t bytes, Table* t) {
  static const std::string end = "\nend\n";
  const char* found = static_cast<const char*>(memmem(text, bytes, end.data(), end.size()));
  if (!found) return fail(SL_IO, "the launch table has no end");
  std::istringstream lines(std::string(text, found + 1 - text));
  for (std::string line; std::getline(lines, line);)
    if (!parse_line(line, found + end.size(), t))
      return fail(SL_IO, "the launch table holds %.80s", line.c_str());
  for (const Kernel& k : t->kernels)
    if (!k.code && !k.is_vendor())
      return fail(SL_IO, "the launch table has no code object of %s", k.name.c_str());
  return SL_OK;
}

// The table behind the library file in which this function lies.
inline sl_status read_own_table(Table* t) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&read_own_table), &info) || !info.dli_fname)
    return fail(SL_INTERNAL, "cannot tell which file this library is");
  const int fd = ::open(info.dli_fname, O_RDONLY | O_CLOEXEC);
  struct stat facts;
  if (fd < 0 || fstat(fd, &facts) != 0) {
    if (fd >= 0) ::close(fd);
    return fail(SL_IO, "cannot read %s: %s", info.dli_fname, strerror(errno));
  }
  t->file = sl::Arena::file(fd, facts.st_size);
  ::close(fd);
  if (!t->file) return fail(SL_NO_MEMORY, "cannot map %s", info.dli_fname);
  const char* begin = static_cast<const char*>(t->file.data());
  const char* trailer = begin + facts.st_size - kTrailerBytes;
  int64_t offset = 0;
  if (facts.st_size > kTrailerBytes) std::memcpy(&offset, trailer, sizeof offset);
  if (offset <= 0 || offset >= facts.st_size - kTrailerBytes ||
      std::memcmp(trailer + sizeof offset, kTrailer, sizeof kTrailer - 1) != 0)
    return fail(SL_IO, "%s has no launch table behind it", info.dli_fname);
  return parse_table(begin + offset, trailer - begin - offset, t);
}

}  // namespace slg
