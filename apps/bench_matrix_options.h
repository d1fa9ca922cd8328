// `servoflow bench --matrix FILE.toml`: the options that belong to it, and what it does.
#pragma once

#include <memory>
#include <string>

#include "common.h"

namespace servoflow::cli {

struct MatrixCommand {
  std::string matrix, out, compare;
  double tolerance_percent = 2;
  bool used() const { return !matrix.empty(); }
};

// To be called when all other options of `app` are there: of those, a matrix goes with the ones about output,
// tokenizer and assets alone, because the rest stands in its file.
void add_matrix_options(CLI::App& app, MatrixCommand& command);
Status run_matrix_command(const MatrixCommand& command, const CommonOptions& common);

}  // namespace servoflow::cli
