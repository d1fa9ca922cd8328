/* One inference in C11: picture files, state and prompt in, a table of actions out.
 *
 * usage: infer CHECKPOINT ROBOT SEED STATE PROMPT CAMERA=FILE ...
 *   infer tests/golden/openpi-tiny libero 7 0,0,0,0,0,0,0,0 "open the drawer" \
 *     base_0_rgb=examples/frames/base.png left_wrist_0_rgb=examples/frames/wrist.png
 *
 * Prints one line per action, in robot units, with all the digits of a double. */
#include <errno.h>
#include <servoflow/servoflow.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kMaxImages = 8, kMaxState = 64 };

static int failed(const char* what) {
  fprintf(stderr, "%s: %s\n", what, servoflow_last_error());
  return 3;
}

/* The whole file in memory that the caller frees; NULL if that cannot be. */
static uint8_t* read_file(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  if (file == NULL) return NULL;
  uint8_t* bytes = NULL;
  if (fseek(file, 0, SEEK_END) == 0) {
    const long end = ftell(file);
    if (end > 0 && fseek(file, 0, SEEK_SET) == 0 && (bytes = malloc((size_t)end)) != NULL) {
      *size = fread(bytes, 1, (size_t)end, file);
      if (*size != (size_t)end) {
        free(bytes);
        bytes = NULL;
      }
    }
  }
  fclose(file);
  return bytes;
}

/* "0.1,-2" to numbers; -1 if that is not what the text holds. */
static int read_state(const char* text, double* state) {
  int count = 0;
  for (char* end = NULL;; text = end + 1) {
    if (count == kMaxState) return -1;
    state[count++] = strtod(text, &end);
    if (end == text || (*end != ',' && *end != '\0')) return -1;
    if (*end == '\0') return count;
  }
}

static void print_actions(const servoflow_chunk_view* chunk) {
  for (int row = 0; row < chunk->horizon; ++row)
    for (int column = 0; column < chunk->action_dim; ++column)
      printf("%.17g%c", chunk->actions[row * chunk->action_dim + column],
             column + 1 < chunk->action_dim ? ' ' : '\n');
  fprintf(stderr, "%d actions of width %d in %.2f ms on %s, %s; contract %.16s\n", (int)chunk->horizon,
          (int)chunk->action_dim, chunk->total_ms, chunk->backend, chunk->precision, chunk->contract_hash);
}

static int infer(servoflow_session* session, const servoflow_observation* observation) {
  servoflow_chunk* chunk = NULL;
  if (servoflow_chunk_new(&chunk) != SERVOFLOW_OK) return failed("chunk");
  int result = 0;
  servoflow_chunk_view view = SERVOFLOW_CHUNK_VIEW_INIT;
  if (servoflow_infer(session, observation, NULL, chunk) != SERVOFLOW_OK)
    result = failed("infer");
  else if (servoflow_chunk_get(chunk, &view) != SERVOFLOW_OK)
    result = failed("chunk");
  else
    print_actions(&view);
  (void)servoflow_chunk_free(chunk);
  return result;
}

static int run(const char* checkpoint, const char* robot, uint64_t seed,
               const servoflow_observation* observation) {
  servoflow_policy_options options = SERVOFLOW_POLICY_OPTIONS_INIT;
  options.device = "cpu";
  options.precision = "fp32";
  options.robot = robot;
  servoflow_policy* policy = NULL;
  if (servoflow_policy_open(checkpoint, &options, &policy) != SERVOFLOW_OK) return failed("open");

  servoflow_session_options session_options = SERVOFLOW_SESSION_OPTIONS_INIT;
  session_options.seed = seed;
  servoflow_session* session = NULL;
  int result = 0;
  if (servoflow_session_new(policy, &session_options, &session) != SERVOFLOW_OK)
    result = failed("session");
  else
    result = infer(session, observation);
  (void)servoflow_session_free(session);
  (void)servoflow_policy_free(policy);
  return result;
}

int main(int argc, char** argv) {
  if (argc < 7 || argc > 6 + kMaxImages) {
    fprintf(stderr, "usage: %s CHECKPOINT ROBOT SEED STATE PROMPT CAMERA=FILE ...\n", argv[0]);
    return 2;
  }
  double state[kMaxState];
  const int state_count = read_state(argv[4], state);
  if (state_count < 0) {
    fprintf(stderr, "STATE: \"%s\" is not at most %d numbers with commas between them\n", argv[4],
            (int)kMaxState);
    return 2;
  }
  servoflow_image images[kMaxImages];
  uint8_t* files[kMaxImages] = {NULL};
  size_t count = 0;
  int result = 0;
  for (int i = 6; i < argc && result == 0; ++i, ++count) {
    char* equals = strchr(argv[i], '=');
    const servoflow_image empty = SERVOFLOW_IMAGE_INIT;
    images[count] = empty;
    if (equals == NULL || (files[count] = read_file(equals + 1, &images[count].byte_count)) == NULL) {
      fprintf(stderr, "%s: not CAMERA=FILE with a file that can be read (%s)\n", argv[i], strerror(errno));
      result = 2;
      break;
    }
    *equals = '\0';
    images[count].name = argv[i];
    images[count].bytes = files[count];
    images[count].layout = SERVOFLOW_ENCODED;
  }
  if (result == 0) {
    servoflow_observation observation = SERVOFLOW_OBSERVATION_INIT;
    observation.images = images;
    observation.image_count = count;
    observation.state = state;
    observation.state_count = (size_t)state_count;
    observation.prompt = argv[5];
    result = run(argv[1], argv[2], strtoull(argv[3], NULL, 10), &observation);
  }
  for (size_t i = 0; i < kMaxImages; ++i) free(files[i]);
  return result;
}
