/* servoflow in C: open a checkpoint once, one session per robot, frames and state in, a chunk of actions out.
 *
 *   servoflow_policy_options options = SERVOFLOW_POLICY_OPTIONS_INIT;
 *   options.robot = "libero";
 *   servoflow_policy* policy = NULL;
 *   if (servoflow_policy_open("checkpoint/", &options, &policy) != SERVOFLOW_OK)
 *     fprintf(stderr, "%s\n", servoflow_last_error());
 *
 * docs/c-api.md walks through a whole program; examples/c/infer.c is one.
 *
 * Errors. Functions return a status. When it is not SERVOFLOW_OK, servoflow_last_error() tells what is wrong:
 * the field, the cause and often the fix. Nothing is thrown, printed or aborted, and output arguments are
 * left as they were, but for a chunk, which is emptied by an inference that fails.
 *
 * Handles. A handle is a name for an object in the library, never a pointer to follow: NULL, a freed handle,
 * one of another kind or a made-up one is SERVOFLOW_INVALID_INPUT. Freeing NULL is allowed and does nothing.
 * A session keeps what it needs of its policy, so handles may be freed in any order; one that is freed while
 * another thread uses it ends when that use ends.
 *
 * Threads. Every function may be called from any thread. Calls on one session, or with one chunk, take turns;
 * sessions of one policy prepare their inputs at the same time and take turns on the device. Use one session
 * per robot: the order of its calls decides its noise.
 *
 * Versions. A struct starts with its own size, which the INIT macros fill in. Later versions only append
 * fields. An older library accepts a newer struct if the fields it does not know are zero, and a newer
 * library takes the fields that an older caller does not have as zero, which always means "as before".
 *
 * Text is UTF-8 and ends with a zero byte. All pointers in arguments are borrowed for the call only.
 */
#ifndef SERVOFLOW_SERVOFLOW_H_
#define SERVOFLOW_SERVOFLOW_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SERVOFLOW_API __attribute__((visibility("default")))
#else
#define SERVOFLOW_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a program compiled against an older header could no longer work. */
#define SERVOFLOW_ABI_VERSION 1

typedef int32_t servoflow_status;
enum {
  SERVOFLOW_OK = 0,
  SERVOFLOW_CHECK_FAILED = 1,  /* a comparison or gate did not hold */
  SERVOFLOW_INVALID_INPUT = 2, /* files, fields or arguments are wrong; the message names which */
  SERVOFLOW_RUNTIME = 3 /* the machine or device failed: out of memory, I/O, a result that is not finite */
};

/* SERVOFLOW_ABI_VERSION of the library that runs, and its version as text ("0.1.0"). */
SERVOFLOW_API int32_t servoflow_abi_version(void);
SERVOFLOW_API const char* servoflow_version(void);

/* Why the last call on this thread failed; "" after one that succeeded. Never NULL; valid until this thread
 * calls another function of the library (the functions of this paragraph excepted). */
SERVOFLOW_API const char* servoflow_last_error(void);

typedef struct servoflow_policy servoflow_policy;
typedef struct servoflow_session servoflow_session;
typedef struct servoflow_chunk servoflow_chunk;

/* ---- a policy: a checkpoint, checked and packed for a device ---- */

typedef struct servoflow_policy_options {
  size_t struct_size;
  const char* device; /* "auto" (NULL), "cpu", "cuda", "cuda:1", "cuda:0,1", "cuda:all" */
  /* "auto" (NULL: a quantized checkpoint's own, else bf16 where the device has it), "fp32", "bf16", a recipe
   * ("int8-w8a8") or a plan's file */
  const char* precision;
  const char* tokenizer; /* SentencePiece model file; NULL: looked for as the README says */
  const char* robot;     /* of sessions that name none: built-in name or contract file; NULL: none */
  const char* assets;    /* statistics folder under assets/; NULL: the robot's, else the only one */
  int32_t threads;       /* CPU threads; 0: one per core this process may use */
  int32_t max_batch;     /* most sessions of one device in one servoflow_infer_batch; 0: 1 */
  /* Called while weights are packed, from the thread that opens. May be NULL. Must not throw or jump. */
  void (*progress)(uint64_t done, uint64_t total, void* user);
  void* progress_user;
} servoflow_policy_options;
#define SERVOFLOW_POLICY_OPTIONS_INIT \
  { sizeof(servoflow_policy_options), 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* What the matrices of one part of the network compute in; a part may have several. */
typedef struct servoflow_component_precision {
  size_t struct_size;
  const char*
      component; /* "vision", "projector", "language model", "expert", "action and time projections" */
  const char* precision; /* "bf16", "fp32", or the format of weights and inputs: "int8-w8a8", … */
  const char* kernel;    /* how a quantized format is computed here; "" for plain bf16 and fp32 */
  int32_t layers;
  int32_t reserved; /* 0 */
  uint64_t parameters, weight_bytes;
} servoflow_component_precision;

/* Strings and `components` are valid while the policy's handle is. */
typedef struct servoflow_policy_info {
  size_t struct_size;
  const char* checkpoint;
  const char* layout;    /* "openpi", "lerobot", "servoflow" */
  const char* device;    /* what runs: "cpu", "cuda:0,cuda:1" */
  const char* backend;   /* "cpu/avx512_bf16" */
  const char* precision; /* "fp32", "bf16", a recipe or what a quantized checkpoint holds */
  const char* hardware;  /* the first GPU and its driver; "" on the CPU */
  int32_t threads, device_count;
  int32_t horizon;          /* actions of a chunk */
  int32_t model_action_dim; /* columns of the noise and of `normalized` */
  int32_t image_size;       /* side of the model's pictures, pixels */
  int32_t max_tokens, camera_slots;
  int32_t reserved; /* 0 */
  uint64_t parameters, weight_bytes, workspace_bytes;
  double ready_seconds; /* from opening to ready */
  /* What `precision` means part by part: [component_count], all of the first one's struct_size apart. A
   * library from before these fields leaves them 0. */
  const servoflow_component_precision* components;
  size_t component_count;
} servoflow_policy_info;
#define SERVOFLOW_POLICY_INFO_INIT \
  { sizeof(servoflow_policy_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* Reads, checks and packs a checkpoint directory. Every problem found in it is in one message. `options` may
 * be NULL: all defaults. */
SERVOFLOW_API servoflow_status servoflow_policy_open(const char* checkpoint,
                                                     const servoflow_policy_options* options,
                                                     servoflow_policy** policy);
SERVOFLOW_API servoflow_status servoflow_policy_get_info(servoflow_policy* policy,
                                                         servoflow_policy_info* info);
SERVOFLOW_API servoflow_status servoflow_policy_free(servoflow_policy* policy);

/* ---- a session: one robot's stream of inferences ---- */

typedef struct servoflow_session_options {
  size_t struct_size;
  const char* robot; /* NULL: the policy's, else the checkpoint's own; "none": slots and tokens, no state */
  uint64_t seed;     /* of the session's noise */
} servoflow_session_options;
#define SERVOFLOW_SESSION_OPTIONS_INIT \
  { sizeof(servoflow_session_options), 0, 0 }

SERVOFLOW_API servoflow_status servoflow_session_new(servoflow_policy* policy,
                                                     const servoflow_session_options* options,
                                                     servoflow_session** session);
/* Starts an episode anew: request index 0, caches dropped. */
SERVOFLOW_API servoflow_status servoflow_session_reset(servoflow_session* session);
/* The robot contract as canonical JSON, and the SHA-256, in hexadecimal, of that without the labels
 * actions.names and actions.units. Valid while the session's handle is. */
SERVOFLOW_API servoflow_status servoflow_session_contract(servoflow_session* session, const char** json,
                                                          const char** hash);
SERVOFLOW_API servoflow_status servoflow_session_free(servoflow_session* session);

/* ---- what a robot sees and is told ---- */

enum {
  SERVOFLOW_HWC = 0,    /* [height, width, 3] bytes */
  SERVOFLOW_CHW = 1,    /* [3, height, width] bytes */
  SERVOFLOW_ENCODED = 2 /* the bytes of a PNG or JPEG file; height and width are ignored */
};

typedef struct servoflow_image {
  size_t struct_size;
  const char* name; /* request key of the contract ("observation/image") or model slot ("base_0_rgb") */
  const uint8_t* bytes;
  size_t byte_count;
  int32_t layout; /* SERVOFLOW_HWC, SERVOFLOW_CHW or SERVOFLOW_ENCODED */
  int32_t height, width;
  int32_t reserved; /* 0 */
} servoflow_image;
#define SERVOFLOW_IMAGE_INIT \
  { sizeof(servoflow_image), 0, 0, 0, 0, 0, 0, 0 }

typedef struct servoflow_observation {
  size_t struct_size;
  const servoflow_image* images; /* [image_count], all of the first one's struct_size apart */
  size_t image_count;
  const double* state; /* [state_count] robot units: the contract's state parts, one after the other */
  size_t state_count;
  const char* prompt;    /* NULL: the contract's default prompt, else an error */
  const int32_t* tokens; /* [token_count] ready token ids instead of a prompt; not both */
  size_t token_count;
} servoflow_observation;
#define SERVOFLOW_OBSERVATION_INIT \
  { sizeof(servoflow_observation), 0, 0, 0, 0, 0, 0, 0 }

typedef struct servoflow_infer_options {
  size_t struct_size;
  const float* noise; /* [horizon, model_action_dim] at t = 1; NULL: seeded noise */
  size_t noise_count; /* floats in `noise`, all of it: for a batch [sessions, horizon, model_action_dim] */
  int32_t steps;      /* Euler steps, 1 to 50; 0: the checkpoint's own */
  int32_t reserved;   /* 0 */
} servoflow_infer_options;
#define SERVOFLOW_INFER_OPTIONS_INIT \
  { sizeof(servoflow_infer_options), 0, 0, 0, 0 }

/* ---- a chunk: what comes back ---- */

/* A chunk is made once and filled by every inference, which reuses its memory. */
SERVOFLOW_API servoflow_status servoflow_chunk_new(servoflow_chunk** chunk);
SERVOFLOW_API servoflow_status servoflow_chunk_free(servoflow_chunk* chunk);

/* Pointers are valid until the chunk is filled again or freed. Times are wall-clock milliseconds. */
typedef struct servoflow_chunk_view {
  size_t struct_size;
  const double* actions;   /* [horizon, action_dim] robot units */
  const float* normalized; /* [horizon, model_dim] as the flow left them */
  int32_t horizon, action_dim, model_dim;
  int32_t prefix_tokens;    /* valid image and text tokens the model saw */
  int32_t prompt_truncated; /* 1: the prompt was longer than the model's token limit */
  int32_t reserved;         /* 0 */
  uint64_t request;         /* the session's inference index, part of the noise counter */
  const char* device;       /* what ran: "cpu", "cuda:0" */
  const char* backend;
  const char* precision;
  const char* contract_hash;
  double preprocess_ms, vision_ms, prefix_ms, denoise_ms, postprocess_ms, total_ms;
  double device_ms;      /* the device's own time, first copy in to last copy out; 0 without a device clock */
  const double* step_ms; /* [step_count] each denoise step, where the device tells */
  size_t step_count;
} servoflow_chunk_view;
#define SERVOFLOW_CHUNK_VIEW_INIT \
  { sizeof(servoflow_chunk_view), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* An error while the chunk has not been filled, or after an inference into it failed. */
SERVOFLOW_API servoflow_status servoflow_chunk_get(servoflow_chunk* chunk, servoflow_chunk_view* view);

/* ---- inference ---- */

/* One observation to one chunk. `options` may be NULL. The same request gives the same bits, alone or in a
 * batch. */
SERVOFLOW_API servoflow_status servoflow_infer(servoflow_session* session,
                                               const servoflow_observation* observation,
                                               const servoflow_infer_options* options,
                                               servoflow_chunk* chunk);

/* `count` sessions of one policy in one pass: sessions[i] gets observations[i] and fills chunks[i]. No
 * session and no chunk may stand there twice. All succeed or all fail. */
SERVOFLOW_API servoflow_status servoflow_infer_batch(servoflow_session* const* sessions,
                                                     const servoflow_observation* const* observations,
                                                     servoflow_chunk* const* chunks, size_t count,
                                                     const servoflow_infer_options* options);

#ifdef __cplusplus
}
#endif
#endif
