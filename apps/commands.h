// The subcommands. Each adds itself to the application and, when it is the one that was called, sets the
// action.
#pragma once

#include "common.h"

namespace servoflow::cli {

void add_plan(CLI::App& app, Action& action);
void add_inspect(CLI::App& app, Action& action);
void add_run(CLI::App& app, Action& action);
void add_verify(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_probe(CLI::App& app, Action& action);
void add_calibrate(CLI::App& app, Action& action);
void add_compare(CLI::App& app, Action& action);
void add_e2m1(CLI::App& app, Action& action);
void add_quantize(CLI::App& app, Action& action);
void add_ranges(CLI::App& app, Action& action);
void add_serve(CLI::App& app, Action& action);
void add_synth(CLI::App& app, Action& action);

}  // namespace servoflow::cli
