// The parity proof: recomputes recorded cases with this engine, stage by stage, and judges every stage by the
// case's own gates. Nothing here knows a particular checkpoint; sizes, cameras, prompts and tolerances come
// from the files.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/policy.h"
#include "servoflow/status.h"
#include "toolkit/judge.h"

namespace servoflow::toolkit {

struct VerifyOptions {
  std::string cases;  // folder of case files; empty: CHECKPOINT/cases
  std::string device = "auto", precision = "fp32";
  std::string tokenizer, assets;
  int threads = 0;
  ProgressFunction loading;                                                   // bytes of weights read
  std::function<void(int done, int total, const std::string& next)> running;  // before each case
};

struct VerifyReport {
  std::string checkpoint, cases, layout;
  std::string device, backend, precision;  // what ran
  int threads = 0, case_count = 0;
  std::vector<Record> records;     // by case, then in the order of the pipeline
  std::vector<std::string> notes;  // "case: what was read but not judged, or why"
  int passed = 0, failed = 0;      // judged records
};

// Fails when a file is wrong or the engine cannot run; a stage outside its gate is not a failure but a
// record.
Result<VerifyReport> verify_checkpoint(const std::string& checkpoint, const VerifyOptions& options);

// check_failed when a record failed, or when nothing was judged (a proof of nothing must not pass).
Status verify_outcome(const VerifyReport& report);

// One row per stage group with the worst over all cases, then every failed record; with `all`, every record.
std::string verify_text(const VerifyReport& report, bool all);
// {checkpoint, …, records: […], passed, failed}
Json verify_to_json(const VerifyReport& report);

}  // namespace servoflow::toolkit
