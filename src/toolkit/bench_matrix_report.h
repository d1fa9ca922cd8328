// A measured matrix for people: a table, files for spreadsheets, one HTML file to send around, and the
// verdict against an earlier result.
#pragma once

#include <string>
#include <vector>

#include "toolkit/bench_matrix.h"
#include "toolkit/html_report.h"

namespace servoflow::toolkit {

struct ArmComparison {
  MatrixArm arm;
  Interval ratio;  // of the medians' times, now / before
  double before_ms = 0, now_ms = 0;
  Verdict verdict = Verdict::kWithinNoise;
};

struct MatrixComparison {
  std::string before;  // the file
  double tolerance = 0, level = 0;
  std::vector<ArmComparison> arms;
  std::vector<std::string> only_before, only_now;  // arms that only one of the two has
  bool same_actions = true;                        // all arms in both gave the same bits
};

// The interval's level is 1 - 0.05 / arms, so that equal builds are called different in one comparison of
// twenty, however many arms there are. Results of another machine, device or model are an error: their times
// say nothing about a change.
Result<MatrixComparison> compare_matrices(const MatrixResult& now, const MatrixResult& before,
                                          const std::string& before_path, double tolerance);
// check_failed if an arm is slower.
Status comparison_outcome(const MatrixComparison& comparison);
std::string comparison_text(const MatrixComparison& comparison);
Json comparison_to_json(const MatrixComparison& comparison);

std::string matrix_text(const MatrixResult& result);
// One row per sample, or one per arm; lines with '#' in front hold the protocol.
std::string matrix_samples_csv(const MatrixResult& result);
std::string matrix_summary_csv(const MatrixResult& result);
HtmlReport matrix_html(const MatrixResult& result, const MatrixComparison* comparison);

// matrix.json, samples.csv, summary.csv and report.html in `folder`.
Status write_matrix(const MatrixResult& result, const MatrixComparison* comparison,
                    const std::string& folder);

}  // namespace servoflow::toolkit
