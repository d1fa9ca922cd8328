// The subcommands. Each adds itself to the application and, when it is the one that was called, sets the
// action.
#pragma once

#include "common.h"

namespace servoflow::cli {

void add_inspect(CLI::App& app, Action& action);
void add_run(CLI::App& app, Action& action);
void add_verify(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_serve(CLI::App& app, Action& action);
void add_synth(CLI::App& app, Action& action);

}  // namespace servoflow::cli
