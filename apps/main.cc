// `servoflow`: one binary, git-style subcommands. Exit codes: 0 success, 1 a check failed, 2 bad input or
// usage, 3 the device or the machine failed.
#include <cstdio>
#include <exception>
#include <new>

#include "commands.h"
#include "toolkit/machine.h"

namespace servoflow::cli {
namespace {

int report(const Status& status) {
  if (status.ok()) return 0;
  std::fprintf(stderr, "servoflow: %s\n", status.message().c_str());
  return exit_code(status);
}

int run(int argc, char** argv) {
  CLI::App app("servoflow: runs pi0.5 robot policies on one machine, without Python.", "servoflow");
  const Json build = toolkit::build_json();
  app.set_version_flag("--version", "servoflow " + build["version"].get<std::string>());
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  add_examples(app, "servoflow inspect tests/golden/openpi-tiny --robot libero",
               "servoflow verify tests/golden/openpi-tiny");
  Action action;

  add_plan(app, action);
  add_inspect(app, action);
  add_run(app, action);
  add_verify(app, action);
  add_calibrate(app, action);
  add_ranges(app, action);
  add_quantize(app, action);
  add_compare(app, action);
  add_e2m1(app, action);
  add_bench(app, action);
  add_probe(app, action);
  add_serve(app, action);
  add_synth(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Asking for help is no mistake; everything else CLI11 reports is wrong usage.
    return app.exit(error) == 0 ? 0 : 2;
  }
  const Status status = action();
  const int code = report(status);
  const int flushed = report(flush_output());
  return code != 0 ? code : flushed;
}

}  // namespace
}  // namespace servoflow::cli

int main(int argc, char** argv) {
  // The library throws nothing; what arrives here is the standard library running out of something.
  try {
    return servoflow::cli::run(argc, argv);
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "servoflow: out of memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "servoflow: internal error: %s\n", error.what());
  }
  return 3;
}
