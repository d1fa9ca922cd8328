// Replays recorded requests (`servoflow serve --record`) against a running server, without a robot, and
// compares the actions bit for bit.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "recorded_case.h"
#include "robot_client.h"

namespace {

constexpr const char* kUsage =
    "usage: robot_client --dry-run FOLDER [--host H] [--port P]\n"
    "\n"
    "Sends every recorded request of FOLDER (*.safetensors, from `servoflow serve --record`) to the server "
    "at\n"
    "H (127.0.0.1), port P (8000), and compares the actions bit for bit. $SERVOFLOW_API_KEY is sent as its "
    "key.\n"
    "Exit code: 0 all equal, 1 some differ, 2 something is wrong (told on stderr).\n";

struct Arguments {
  std::string folder;
  robot::Address address;
};

Arguments parse(int argc, char** argv) {
  Arguments out;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name != "--dry-run" && name != "--host" && name != "--port")
      throw std::invalid_argument(name + ": unknown option; see --help");
    if (++i == argc) throw std::invalid_argument(name + ": needs a value");
    const std::string value = argv[i];
    if (name == "--dry-run") out.folder = value;
    if (name == "--host") out.address.host = value;
    if (name == "--port") {
      const char* end = value.data() + value.size();
      const auto [stopped, error] = std::from_chars(value.data(), end, out.address.port);
      if (error != std::errc() || stopped != end)
        throw std::invalid_argument("--port " + value + ": is no port");
    }
  }
  if (out.folder.empty()) throw std::invalid_argument("--dry-run FOLDER is needed; see --help");
  if (const char* key = std::getenv("SERVOFLOW_API_KEY")) out.address.api_key = key;
  return out;
}

bool same_bits(const robot::Actions& a, const robot::Actions& b) {
  return a.horizon == b.horizon && a.dim == b.dim &&
         std::memcmp(a.values.data(), b.values.data(), a.values.size() * sizeof(double)) == 0;
}

double worst(const robot::Actions& a, const robot::Actions& b) {
  if (a.horizon != b.horizon || a.dim != b.dim) return HUGE_VAL;
  double out = 0;
  for (std::size_t i = 0; i < a.values.size(); ++i) out = std::max(out, std::abs(a.values[i] - b.values[i]));
  return out;
}

int dry_run(const Arguments& arguments) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(arguments.folder))
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path());
  if (paths.empty())
    throw std::runtime_error(arguments.folder + ": no recorded request (*.safetensors) in it");
  std::sort(paths.begin(), paths.end());
  robot::Connection connection(arguments.address);
  int equal = 0, different = 0;
  for (const auto& path : paths) {
    const robot::RecordedCase recorded = robot::read_case(path.string());
    const robot::Actions actions = connection.infer(recorded.observation);
    if (same_bits(actions, recorded.expected)) {
      ++equal;
      std::printf("%s: equal\n", path.filename().c_str());
    } else {
      ++different;
      std::printf("%s: different by up to %.3g\n", path.filename().c_str(),
                  worst(actions, recorded.expected));
    }
  }
  std::printf("%d equal, %d different\n", equal, different);
  return different > 0 ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--help") == 0) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    return dry_run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "robot_client: %s\n", error.what());
    return 2;
  }
}
