/*
 * anyflow.h: run a bundle of anyflow_deploy from C, or from any language that can call C.
 *
 *   anyflow_bundle *bundle;
 *   anyflow_error *error = anyflow_bundle_open("my-bundle", NULL, &bundle);
 *   if (error) { fprintf(stderr, "%s\n", anyflow_error_text(error)); anyflow_error_free(error); return 1; }
 *
 * Rules that hold everywhere:
 *
 * - A function that can fail returns an anyflow_error, NULL when all went well. Its text says what was given, what is
 *   allowed and what to do; whoever receives it frees it. Outputs are written only on success.
 * - Every struct begins with struct_size. Set it to sizeof the struct (ANYFLOW_INIT does), and programs compiled with an
 *   older header go on working: fields they do not know are zero, and zero always means "as usual".
 * - Latents are float32 (batch, frames, channels, height, width), contiguous; text is (batch, tokens, channels). Times are
 *   timesteps: 1000 is noise, 0 is clean.
 * - Handles may be closed in any order: what still needs another one keeps it. NULL may always be closed or freed.
 * - Bundles, schedules, paces and engines may be shared between threads. A run and a stream belong to one thread at a time.
 * - Callbacks run on the thread that called, and must not throw or jump out.
 *
 * C99, and C++ (anyflow.hpp is a wrapper with destructors and exceptions).
 */
#ifndef ANYFLOW_H
#define ANYFLOW_H

#include <stddef.h>
#include <stdint.h>

#include "anyflow/version.h" /* ANYFLOW_VERSION_MAJOR, _MINOR, _PATCH, and ANYFLOW_VERSION as text */

#if defined(_WIN32)
#if defined(ANYFLOW_BUILDING)
#define ANYFLOW_API __declspec(dllexport)
#elif defined(ANYFLOW_STATIC)
#define ANYFLOW_API
#else
#define ANYFLOW_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define ANYFLOW_API __attribute__((visibility("default")))
#else
#define ANYFLOW_API
#endif

/* A struct with nothing but its size: anyflow_sample_params params = ANYFLOW_INIT(anyflow_sample_params); */
#ifdef __cplusplus
template <typename T>
inline T anyflow_init() {
    T value = {};
    value.struct_size = sizeof(T);
    return value;
}
#define ANYFLOW_INIT(type) (anyflow_init<type>())
#else
#define ANYFLOW_INIT(type) {.struct_size = sizeof(type)}
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the library that is loaded, as in ANYFLOW_VERSION. Static. */
ANYFLOW_API const char *anyflow_version(void);

/* ---- Errors ---------------------------------------------------------------------------------------------------- */

typedef struct anyflow_error anyflow_error;

typedef enum anyflow_code {
    ANYFLOW_INVALID = 1,       /* an argument that is never right: a NULL, a schedule that rises, NaN */
    ANYFLOW_BUNDLE = 2,        /* a bundle or an engine that is missing, damaged, changed or too new */
    ANYFLOW_SHAPE = 3,         /* a shape outside what the bundle declares */
    ANYFLOW_BACKEND = 4,       /* no such backend here, or it was built elsewhere, or it refuses */
    ANYFLOW_ABORTED = 5,       /* an abort callback said so */
    ANYFLOW_OUT_OF_MEMORY = 6, /* on the host or on the device */
    ANYFLOW_INTERNAL = 7       /* a defect of this library; please report the text */
} anyflow_code;

ANYFLOW_API anyflow_code anyflow_error_code(const anyflow_error *error);
/* UTF-8; lives as long as the error. */
ANYFLOW_API const char *anyflow_error_text(const anyflow_error *error);
ANYFLOW_API void anyflow_error_free(anyflow_error *error);

/* ---- Log ------------------------------------------------------------------------------------------------------- */

typedef enum anyflow_log_level {
    ANYFLOW_LOG_DEBUG = 0,
    ANYFLOW_LOG_INFO = 1,
    ANYFLOW_LOG_WARNING = 2,
    ANYFLOW_LOG_ERROR = 3
} anyflow_log_level;

/* Where messages go, for the whole process; NULL (as it is at first): nowhere. Called from any thread that is in here. */
typedef void (*anyflow_log_callback)(anyflow_log_level level, const char *text, void *user);
ANYFLOW_API void anyflow_set_log(anyflow_log_callback callback, void *user);

/* ---- Bundles --------------------------------------------------------------------------------------------------- */

typedef struct anyflow_bundle anyflow_bundle;

/* Work so far, of `total`; bytes where files are hashed. */
typedef void (*anyflow_progress_callback)(uint64_t done, uint64_t total, void *user);
/* Asked again and again; anything but 0 ends the call with ANYFLOW_ABORTED. */
typedef int (*anyflow_abort_callback)(void *user);

typedef struct anyflow_bundle_params {
    size_t struct_size;
    int skip_hashes; /* sizes and paths are checked all the same; only for storage that cannot have changed */
    anyflow_progress_callback progress;
    anyflow_abort_callback abort;
    void *user; /* handed to both */
} anyflow_bundle_params;

/* Open a bundle: manifest, sizes and SHA-256 of every file are checked. params may be NULL. */
ANYFLOW_API anyflow_error *anyflow_bundle_open(const char *path, const anyflow_bundle_params *params, anyflow_bundle **bundle);
ANYFLOW_API void anyflow_bundle_close(anyflow_bundle *bundle);

/* What the manifest says. Strings live as long as the bundle. */
typedef struct anyflow_bundle_info {
    size_t struct_size;
    const char *kind; /* "bidirectional" or "causal" */
    const char *model;
    const char *precision;
    const char *digest;    /* SHA-256 of manifest.json, which names the hash of every other file */
    int64_t channels;      /* of the latents */
    int64_t text_channels; /* of the prompt embeddings */
    int64_t text_tokens;   /* that prompt embeddings are padded to, with zeros */
    double shift;          /* of the schedule the model was distilled with */
    int64_t steps;         /* when nobody says */
    int64_t frames;        /* latent frames, rows and columns of the bundle's own video size */
    int64_t height;
    int64_t width;
    int64_t spatial_factor;  /* pixels for each latent row or column */
    int64_t temporal_factor; /* video frames for each latent frame after the first */
    int64_t fps;
} anyflow_bundle_info;

ANYFLOW_API anyflow_error *anyflow_bundle_get_info(const anyflow_bundle *bundle, anyflow_bundle_info *info);

/* A declared range; maximum -1: no limit. Axes: "batch", "frames" (of a chunk, if causal), "height", "width", "text". */
typedef struct anyflow_range {
    size_t struct_size;
    int64_t minimum;
    int64_t maximum;
    int64_t multiple;
} anyflow_range;

ANYFLOW_API anyflow_error *anyflow_bundle_get_range(const anyflow_bundle *bundle, const char *axis, anyflow_range *range);

/* ---- Schedules ------------------------------------------------------------------------------------------------- */

typedef struct anyflow_schedule anyflow_schedule;

/* `steps` (1 to 1000) transitions on the shifted uniform grid; shift 5 for the released models, 1 for none. */
ANYFLOW_API anyflow_error *anyflow_schedule_uniform(int64_t steps, double shift, anyflow_schedule **schedule);
/* Your own noise levels, 1 to 0, falling; a closing 0 is added where missing. */
ANYFLOW_API anyflow_error *anyflow_schedule_from_sigmas(const double *sigmas, size_t count, double shift,
                                                        anyflow_schedule **schedule);
/* Your own timesteps, 1000 to 0, falling; a closing 0 is added where missing. */
ANYFLOW_API anyflow_error *anyflow_schedule_from_timesteps(const double *timesteps, size_t count, anyflow_schedule **schedule);
/* The timesteps, one more than steps; they live as long as the schedule. */
ANYFLOW_API const double *anyflow_schedule_timesteps(const anyflow_schedule *schedule, size_t *count);
ANYFLOW_API void anyflow_schedule_free(anyflow_schedule *schedule);

/* ---- Deadlines ------------------------------------------------------------------------------------------------- */

/* Seconds a transition takes, learnt by shape. Share one between all requests on an engine. */
typedef struct anyflow_pace anyflow_pace;
ANYFLOW_API anyflow_error *anyflow_pace_create(anyflow_pace **pace);
ANYFLOW_API void anyflow_pace_free(anyflow_pace *pace);

/* What came of a deadline. */
typedef struct anyflow_outcome {
    size_t struct_size;
    int64_t steps;   /* from noise to the sample */
    int draft;       /* one more was made to learn the pace, and thrown away */
    double seconds;  /* from the start until the sample was there */
    double deadline; /* that were allowed */
} anyflow_outcome;

/* In place of a schedule: as many steps as the time allows, missed by one step at most. */
typedef struct anyflow_deadline {
    size_t struct_size;
    double seconds;              /* for the transitions of the sample, or of the chunk */
    double shift;                /* of the grid; 0: 5 */
    int64_t most;                /* steps are never more; 0: 50 */
    anyflow_pace *pace;          /* what is known of the engine; NULL: nothing, so it begins with a draft */
    int (*enough)(void *user);   /* asked before every transition; not 0: finish now, with one jump */
    double (*clock)(void *user); /* seconds; NULL: a steady clock. For tests */
    void *user;                  /* handed to both */
} anyflow_deadline;

/* ---- Engines --------------------------------------------------------------------------------------------------- */

typedef struct anyflow_engine anyflow_engine;

typedef struct anyflow_engine_params {
    size_t struct_size;
    const char *backend;  /* "tensorrt" or "tensorrt-rtx", whichever it was compiled for; "aotinductor"; NULL: the first of
                             these for which the bundle has an engine */
    const char *provider; /* "cpu" or "cuda"; NULL: what the backend runs on */
    const char *engine;   /* name of a built engine in the bundle, or a path; NULL: the only one */
    int device;           /* which GPU, counted from 0 */
    int threads;          /* CPU threads, of the whole process; 0: as the backend finds right */
    int skip_hashes;      /* do not compare the engine's files with their hashes */
    int no_cuda_graphs;
} anyflow_engine_params;

/* Backends that this library was built with, the preferred first. Static. */
ANYFLOW_API size_t anyflow_backends(const char *const **names);

/* Open an engine that anyflow-build made of this bundle on this machine. params may be NULL. */
ANYFLOW_API anyflow_error *anyflow_engine_open(const anyflow_bundle *bundle, const anyflow_engine_params *params,
                                               anyflow_engine **engine);
/* Backend, version, device and precision, for people. Lives as long as the engine. */
ANYFLOW_API const char *anyflow_engine_description(const anyflow_engine *engine);
ANYFLOW_API void anyflow_engine_close(anyflow_engine *engine);

/* ---- Sampling -------------------------------------------------------------------------------------------------- */

/* A transition that was just made. Valid until the callback returns. */
typedef struct anyflow_step {
    size_t struct_size;
    int64_t index;
    int64_t steps;     /* how many there are; under a deadline, how many are planned by now */
    double t, r;       /* where it went from and to */
    int64_t shape[5];  /* of the state */
    const void *state; /* for anyflow_step_read */
} anyflow_step;

/* Copies the state z_r, as many numbers as the latents have. On a GPU this costs a copy: only where you look at it. */
ANYFLOW_API anyflow_error *anyflow_step_read(const anyflow_step *step, float *latents);

typedef struct anyflow_sample_params {
    size_t struct_size;
    const anyflow_schedule *schedule; /* this, or */
    const anyflow_deadline *deadline; /* this; with neither: the bundle's own steps and shift */
    void (*on_step)(const anyflow_step *step, void *user);
    anyflow_abort_callback abort;                               /* asked before every transition */
    void (*on_end)(const anyflow_outcome *outcome, void *user); /* under a deadline: what came of it */
    void *user;                                                 /* handed to all three */
} anyflow_sample_params;

/* Take latents from noise to clean. `clean` takes as many numbers as `noise` has, and may be the same memory. */
ANYFLOW_API anyflow_error *anyflow_sample(anyflow_engine *engine, const float *noise, const int64_t shape[5], const float *text,
                                          const int64_t text_shape[3], const anyflow_sample_params *params, float *clean);

/* ---- One run, step by step ------------------------------------------------------------------------------------- */

typedef struct anyflow_run anyflow_run;

ANYFLOW_API anyflow_error *anyflow_run_start(anyflow_engine *engine, const float *latents, const int64_t shape[5],
                                             const float *text, const int64_t text_shape[3], anyflow_run **run);
/* Replace the state z_t by z_r. t and r: `count` numbers each, 1 (for all frames) or batch x frames. */
ANYFLOW_API anyflow_error *anyflow_run_step(anyflow_run *run, const float *t, const float *r, size_t count);
/* The average velocity from t to r, shaped like the latents; the state stays as it is. */
ANYFLOW_API anyflow_error *anyflow_run_velocity(anyflow_run *run, const float *t, const float *r, size_t count, float *velocity);
/* A copy of the state. */
ANYFLOW_API anyflow_error *anyflow_run_read(anyflow_run *run, float *latents);
ANYFLOW_API void anyflow_run_close(anyflow_run *run);

/* ---- Streams of a causal model --------------------------------------------------------------------------------- */

typedef struct anyflow_stream anyflow_stream;

typedef struct anyflow_stream_params {
    size_t struct_size;
    const int64_t *chunk_plan; /* latent frames of each chunk; NULL: the model's own plan */
    size_t chunk_count;
    int64_t window;         /* keep only the first and this many of the newest compressed chunks; 0: all */
    const float *context;   /* given clean latents of the first frames, (1, context_frames, C, H, W), or NULL */
    int64_t context_frames; /* they have to end where a chunk ends */
} anyflow_stream_params;

/* Memory of a stream, before anything runs. */
typedef struct anyflow_cache_size {
    size_t struct_size;
    int64_t frames;         /* latent frames of the whole video */
    int64_t capacity;       /* tokens in each layer's buffers */
    int64_t bytes;          /* keys and values of all layers, with those of the text */
    int64_t encoded_tokens; /* sent through the network for the cache alone, over the whole video */
} anyflow_cache_size;

/* height, width: of the latents. params may be NULL. */
ANYFLOW_API anyflow_error *anyflow_cache_plan(const anyflow_bundle *bundle, const anyflow_stream_params *params, int64_t height,
                                              int64_t width, int64_t text_tokens, anyflow_cache_size *size);

/* A finished piece of a video. */
typedef struct anyflow_chunk {
    size_t struct_size;
    int64_t index;
    int64_t first_frame; /* absolute index of its first latent frame */
    int64_t frames;
    int given;            /* it is context of the caller's */
    const float *latents; /* (1, frames, C, H, W); until the next call with this stream */
} anyflow_chunk;

/* noise: of the whole video, (1, F, C, H, W), copied. All that can be refused is refused here. params may be NULL. */
ANYFLOW_API anyflow_error *anyflow_stream_open(anyflow_engine *engine, const float *noise, const int64_t shape[5],
                                               const float *text, const int64_t text_shape[3],
                                               const anyflow_stream_params *params, anyflow_stream **stream);
/*
 * Make the next chunk, by a schedule or deadline of its own; *made is 0 when there is none left. After an abort or another
 * error the same chunk is begun anew by the next call.
 */
ANYFLOW_API anyflow_error *anyflow_stream_next(anyflow_stream *stream, const anyflow_sample_params *params, anyflow_chunk *chunk,
                                               int *made);
ANYFLOW_API void anyflow_stream_close(anyflow_stream *stream);

/* ---- Helpers --------------------------------------------------------------------------------------------------- */

/* Standard normal numbers, the same as noise(shape, seed) in Python. */
ANYFLOW_API anyflow_error *anyflow_noise(uint64_t seed, float *values, size_t count);

/* A float32 tensor in a .safetensors file: prompt embeddings are "prompt_embeds", latents "latents". */
typedef struct anyflow_tensor anyflow_tensor;
ANYFLOW_API anyflow_error *anyflow_tensor_load(const char *path, const char *name, anyflow_tensor **tensor);
ANYFLOW_API const float *anyflow_tensor_data(const anyflow_tensor *tensor);
ANYFLOW_API const int64_t *anyflow_tensor_shape(const anyflow_tensor *tensor, size_t *axes);
ANYFLOW_API void anyflow_tensor_free(anyflow_tensor *tensor);
/* Written whole or not at all. */
ANYFLOW_API anyflow_error *anyflow_tensor_save(const char *path, const char *name, const float *data, const int64_t *shape,
                                               size_t axes);

#ifdef __cplusplus
}
#endif
#endif
