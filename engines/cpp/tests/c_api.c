/* The header as a C compiler sees it, and what only a C program can get wrong. Prints what failed; exits with how many. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "anyflow/anyflow.h"

void toy_backend_install(void);

static int failures;

static void expect(int right, const char *what, int line) {
    if (!right) {
        printf("line %d: %s\n", line, what);
        ++failures;
    }
}
#define EXPECT(condition) expect((condition) != 0, #condition, __LINE__)

/* An error of this kind, whose text holds some words. */
static void refused(anyflow_error *error, anyflow_code code, const char *words, int line) {
    if (!error || anyflow_error_code(error) != code || !strstr(anyflow_error_text(error), words)) {
        printf("line %d: wanted %d \"%s\", got %d \"%s\"\n", line, (int)code, words, (int)anyflow_error_code(error),
               anyflow_error_text(error));
        ++failures;
    }
    anyflow_error_free(error);
}
#define REFUSED(error, code, words) refused((error), (code), (words), __LINE__)
#define OK(call) good((call), __LINE__)

static void good(anyflow_error *error, int line) {
    if (error) {
        printf("line %d: %s\n", line, anyflow_error_text(error));
        anyflow_error_free(error);
        exit(100);
    }
}

static int steps_seen, logged;
static uint64_t bytes_seen;

static void on_step(const anyflow_step *step, void *user) {
    float state[192];
    EXPECT(step->struct_size == sizeof *step && step->shape[0] == 1 && step->shape[4] == 4);
    good(anyflow_step_read(step, state), __LINE__);
    EXPECT(user == &steps_seen);
    ++*(int *)user;
}
static int after_two(void *user) { return *(int *)user >= 2; }
static int always(void *user) {
    (void)user;
    return 1;
}
static void on_progress(uint64_t done, uint64_t total, void *user) {
    EXPECT(done <= total);
    *(uint64_t *)user = done;
}
static void on_log(anyflow_log_level level, const char *text, void *user) {
    EXPECT(level == ANYFLOW_LOG_INFO && strstr(text, "toy, opened from"));
    ++*(int *)user;
}

static void test_schedules(void) {
    anyflow_schedule *schedule = NULL;
    size_t count = 0;
    const double rising[] = {100, 200}, wrong[] = {1000, NAN};
    OK(anyflow_schedule_uniform(4, 5, &schedule));
    EXPECT(anyflow_schedule_timesteps(schedule, &count)[0] == 1000 && count == 5);
    anyflow_schedule_free(schedule);
    schedule = NULL;
    REFUSED(anyflow_schedule_uniform(0, 5, &schedule), ANYFLOW_INVALID, "steps is 0; allowed are whole numbers from 1 to 1000");
    REFUSED(anyflow_schedule_uniform(4, -1, &schedule), ANYFLOW_INVALID, "shift is -1.0");
    REFUSED(anyflow_schedule_uniform(4, 5, NULL), ANYFLOW_INVALID, "schedule is NULL");
    REFUSED(anyflow_schedule_from_timesteps(rising, 2, &schedule), ANYFLOW_INVALID, "must fall");
    REFUSED(anyflow_schedule_from_timesteps(wrong, 2, &schedule), ANYFLOW_INVALID, "timestep 1 is nan");
    REFUSED(anyflow_schedule_from_timesteps(NULL, 2, &schedule), ANYFLOW_INVALID, "timesteps is NULL");
    REFUSED(anyflow_schedule_from_timesteps(NULL, 0, &schedule), ANYFLOW_INVALID, "at least one transition");
    EXPECT(schedule == NULL);
    EXPECT(anyflow_schedule_timesteps(NULL, &count) == NULL && count == 0);
}

static void test_nothing(void) {
    anyflow_error_free(NULL), anyflow_bundle_close(NULL), anyflow_engine_close(NULL), anyflow_run_close(NULL),
        anyflow_stream_close(NULL);
    anyflow_schedule_free(NULL), anyflow_pace_free(NULL), anyflow_tensor_free(NULL);
    EXPECT(strcmp(anyflow_error_text(NULL), "") == 0 && (int)anyflow_error_code(NULL) == 0);
    REFUSED(anyflow_sample(NULL, NULL, NULL, NULL, NULL, NULL, NULL), ANYFLOW_INVALID, "engine is NULL");
    REFUSED(anyflow_run_step(NULL, NULL, NULL, 0), ANYFLOW_INVALID, "run is NULL");
    REFUSED(anyflow_stream_next(NULL, NULL, NULL, NULL), ANYFLOW_INVALID, "stream is NULL");
    REFUSED(anyflow_bundle_get_info(NULL, NULL), ANYFLOW_INVALID, "bundle is NULL");
    REFUSED(anyflow_step_read(NULL, NULL), ANYFLOW_INVALID, "step is NULL");
}

/* Params of an older and of a newer program. */
static void test_sizes(const anyflow_bundle *bundle) {
    struct {
        anyflow_engine_params known;
        int64_t newer;
    } params = {{.struct_size = sizeof params}, 0};
    anyflow_bundle_info info = ANYFLOW_INIT(anyflow_bundle_info);
    anyflow_engine *engine = NULL;
    params.known.backend = "toy";
    OK(anyflow_engine_open(bundle, &params.known, &engine));
    anyflow_engine_close(engine);
    params.newer = 1;
    REFUSED(anyflow_engine_open(bundle, &params.known, &engine), ANYFLOW_INVALID,
            "fields that this version of the library does not know");
    params.known.struct_size = offsetof(anyflow_engine_params, provider);
    params.known.provider = (const char *)1; /* beyond what an older program knows: not looked at */
    OK(anyflow_engine_open(bundle, &params.known, &engine));
    anyflow_engine_close(engine);
    params.known.struct_size = 0;
    REFUSED(anyflow_engine_open(bundle, &params.known, &engine), ANYFLOW_INVALID,
            "set it with ANYFLOW_INIT(anyflow_engine_params)");
    info.struct_size = offsetof(anyflow_bundle_info, precision);
    info.precision = "untouched";
    OK(anyflow_bundle_get_info(bundle, &info));
    EXPECT(strcmp(info.precision, "untouched") == 0 && strcmp(info.kind, "bidirectional") != strcmp(info.kind, "causal"));
}

static void test_sampling(anyflow_engine *engine) {
    const int64_t shape[5] = {1, 3, 4, 4, 4}, text_shape[3] = {1, 2, 32}, other[5] = {1, 3, 4, 3, 4},
                  huge[5] = {1, INT64_MAX, 4, 4, 4};
    float noise[192], text[64], clean[192], again[192];
    const float middle[3] = {500, 400, 300}, end[3] = {0, 0, 0}, infinite = INFINITY, zero = 0, thousand = 1000;
    anyflow_sample_params params = ANYFLOW_INIT(anyflow_sample_params);
    anyflow_deadline deadline = ANYFLOW_INIT(anyflow_deadline);
    anyflow_schedule *schedule = NULL;
    anyflow_run *run = NULL;
    OK(anyflow_noise(1, noise, 192));
    OK(anyflow_noise(2, text, 64));
    OK(anyflow_schedule_uniform(4, 5, &schedule));
    params.schedule = schedule, params.on_step = on_step, params.user = &steps_seen;
    OK(anyflow_sample(engine, noise, shape, text, text_shape, &params, clean));
    EXPECT(steps_seen == 4);
    params.on_step = NULL;
    memcpy(again, noise, sizeof again);
    OK(anyflow_sample(engine, again, shape, text, text_shape, &params, again)); /* in place */
    EXPECT(memcmp(clean, again, sizeof clean) == 0);
    params.abort = after_two, params.on_step = on_step, steps_seen = 0;
    REFUSED(anyflow_sample(engine, noise, shape, text, text_shape, &params, again), ANYFLOW_ABORTED, "aborted by the caller");
    EXPECT(steps_seen == 2 && memcmp(clean, again, sizeof clean) == 0); /* written only on success */
    params.abort = NULL, params.deadline = &deadline;
    REFUSED(anyflow_sample(engine, noise, shape, text, text_shape, &params, again), ANYFLOW_INVALID, "allowed is one of them");
    params.schedule = NULL;
    REFUSED(anyflow_sample(engine, noise, shape, text, text_shape, &params, again), ANYFLOW_INVALID, "a deadline of 0.0 s");
    deadline.seconds = 10, deadline.enough = always;
    OK(anyflow_sample(engine, noise, shape, text, text_shape, &params, again));
    REFUSED(anyflow_sample(engine, noise, other, text, text_shape, NULL, again), ANYFLOW_SHAPE, "height is 3");
    REFUSED(anyflow_sample(engine, noise, huge, text, text_shape, NULL, again), ANYFLOW_SHAPE, "nor the whole too large");
    REFUSED(anyflow_sample(engine, NULL, shape, text, text_shape, NULL, again), ANYFLOW_INVALID, "latents is NULL");
    REFUSED(anyflow_sample(engine, noise, shape, text, NULL, NULL, again), ANYFLOW_INVALID, "text_shape is NULL");
    REFUSED(anyflow_sample(engine, noise, shape, text, text_shape, NULL, NULL), ANYFLOW_INVALID, "clean is NULL");
    noise[7] = NAN;
    REFUSED(anyflow_sample(engine, noise, shape, text, text_shape, NULL, again), ANYFLOW_INVALID, "latents holds NaN");
    OK(anyflow_run_start(engine, clean, shape, text, text_shape, &run));
    anyflow_engine_close(engine); /* the run keeps it */
    OK(anyflow_run_step(run, middle, end, 3));
    REFUSED(anyflow_run_step(run, end, middle, 3), ANYFLOW_INVALID, "1000 >= t >= r >= 0");
    REFUSED(anyflow_run_step(run, middle, end, 2), ANYFLOW_SHAPE, "t has 2 numbers");
    REFUSED(anyflow_run_step(run, &infinite, &zero, 1), ANYFLOW_INVALID, "t is inf and r is 0.0");
    OK(anyflow_run_velocity(run, &thousand, &thousand, 1, again));
    OK(anyflow_run_read(run, again));
    anyflow_run_close(run);
    anyflow_schedule_free(schedule);
}

static void test_streams(anyflow_engine *engine) {
    const int64_t shape[5] = {1, 5, 4, 8, 8}, text_shape[3] = {1, 2, 32}, plan[] = {1, 2, 2};
    float *noise = malloc(1280 * sizeof *noise), text[64], context[1280];
    anyflow_stream_params params = ANYFLOW_INIT(anyflow_stream_params);
    anyflow_sample_params sampling = ANYFLOW_INIT(anyflow_sample_params);
    anyflow_chunk chunk = ANYFLOW_INIT(anyflow_chunk);
    anyflow_stream *stream = NULL;
    int made = 0, chunks = 0;
    OK(anyflow_noise(1, noise, 1280));
    OK(anyflow_noise(2, text, 64));
    memset(context, 0, sizeof context);
    params.chunk_plan = plan, params.chunk_count = 3, params.context = context, params.context_frames = 2;
    REFUSED(anyflow_stream_open(engine, noise, shape, text, text_shape, &params, &stream), ANYFLOW_SHAPE,
            "not where a chunk ends ([1, 3, 5])");
    params.context_frames = 1;
    OK(anyflow_stream_open(engine, noise, shape, text, text_shape, &params, &stream));
    free(noise), anyflow_engine_close(engine); /* the stream has its own */
    REFUSED(anyflow_stream_next(stream, NULL, NULL, &made), ANYFLOW_INVALID, "chunk is NULL");
    for (; anyflow_stream_next(stream, NULL, &chunk, &made) == NULL && made; ++chunks) {
        EXPECT(chunk.index == chunks && chunk.frames == plan[chunks] && chunk.given == (chunks == 0));
        if (chunks == 0) { /* an abort leaves the chunk to be begun anew */
            sampling.abort = always;
            REFUSED(anyflow_stream_next(stream, &sampling, &chunk, &made), ANYFLOW_ABORTED, "aborted");
        }
    }
    EXPECT(chunks == 3);
    OK(anyflow_stream_next(stream, NULL, &chunk, &made));
    EXPECT(!made);
    anyflow_stream_close(stream);
}

static void test_bundles(const char *path, anyflow_bundle **bundle) {
    anyflow_bundle_params params = ANYFLOW_INIT(anyflow_bundle_params);
    anyflow_range range = ANYFLOW_INIT(anyflow_range);
    params.progress = on_progress, params.user = &bytes_seen;
    OK(anyflow_bundle_open(path, &params, bundle));
    EXPECT(bytes_seen > 0);
    params.abort = always;
    REFUSED(anyflow_bundle_open(path, &params, bundle), ANYFLOW_ABORTED, "aborted by the caller");
    REFUSED(anyflow_bundle_open("/nowhere", NULL, bundle), ANYFLOW_BUNDLE, "/nowhere is not a bundle");
    REFUSED(anyflow_bundle_get_range(*bundle, "depth", &range), ANYFLOW_INVALID, "unknown axis 'depth'");
    OK(anyflow_bundle_get_range(*bundle, "height", &range));
    EXPECT(range.minimum >= 1);
}

static void test_files(const char *folder) {
    char path[4096];
    const int64_t shape[2] = {2, 3};
    const float values[6] = {1, 2, 3, 4, 5, 6};
    anyflow_tensor *tensor = NULL;
    size_t axes = 0;
    snprintf(path, sizeof path, "%s/a \"name\".safetensors", folder);
    OK(anyflow_tensor_save(path, "tab\t\"x\"", values, shape, 2));
    OK(anyflow_tensor_load(path, "tab\t\"x\"", &tensor));
    EXPECT(anyflow_tensor_shape(tensor, &axes)[1] == 3 && axes == 2 &&
           memcmp(anyflow_tensor_data(tensor), values, sizeof values) == 0);
    anyflow_tensor_free(tensor);
    REFUSED(anyflow_tensor_load(path, "y", &tensor), ANYFLOW_INVALID, "holds no float32 tensor 'y'");
    REFUSED(anyflow_tensor_load("/nowhere", "y", &tensor), ANYFLOW_BUNDLE, "cannot be read");
    REFUSED(anyflow_tensor_save("/nowhere/x", "y", values, shape, 2), ANYFLOW_INVALID, "cannot be written");
}

/* c_api BIDIRECTIONAL CAUSAL FOLDER */
int main(int count, char **words) {
    anyflow_bundle *bundle = NULL, *causal = NULL;
    anyflow_engine_params params = ANYFLOW_INIT(anyflow_engine_params);
    anyflow_engine *engine = NULL, *streaming = NULL;
    const char *const *names = NULL;
    size_t backends;
    if (count != 4) return 99;
    toy_backend_install();
    anyflow_set_log(on_log, &logged);
    EXPECT(strcmp(anyflow_version(), ANYFLOW_VERSION) == 0);
    backends = anyflow_backends(&names);
    EXPECT(backends >= 1 && strcmp(names[backends - 1], "toy") == 0);
    test_nothing();
    test_schedules();
    test_files(words[3]);
    test_bundles(words[1], &bundle);
    test_sizes(bundle);
    params.backend = "tensorflow";
    REFUSED(anyflow_engine_open(bundle, &params, &engine), ANYFLOW_BACKEND, "built without a backend 'tensorflow'");
    params.backend = "toy", params.provider = "tpu";
    REFUSED(anyflow_engine_open(bundle, &params, &engine), ANYFLOW_INVALID, "unknown provider 'tpu'");
    params.provider = NULL, params.device = -1;
    REFUSED(anyflow_engine_open(bundle, &params, &engine), ANYFLOW_INVALID, "device is -1");
    params.device = 0;
    REFUSED(anyflow_engine_open(bundle, NULL, &engine), ANYFLOW_BACKEND, "has no engine for a backend of this library");
    OK(anyflow_engine_open(bundle, &params, &engine));
    EXPECT(strcmp(anyflow_engine_description(engine), "toy") == 0);
    anyflow_bundle_close(bundle); /* the engine keeps it */
    OK(anyflow_bundle_open(words[2], NULL, &causal));
    OK(anyflow_engine_open(causal, &params, &streaming));
    anyflow_bundle_close(causal);
    test_sampling(engine);
    test_streams(streaming);
    EXPECT(logged >= 2);
    printf("%d failures\n", failures);
    return failures;
}
