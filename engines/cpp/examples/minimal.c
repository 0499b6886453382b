/* The whole of it in C: minimal BUNDLE EMBEDDINGS.safetensors OUTPUT.safetensors */
#include <stdio.h>
#include <stdlib.h>

#include "anyflow/anyflow.h"

static void need(anyflow_error *error) {
    if (error) {
        fprintf(stderr, "%s\n", anyflow_error_text(error));
        exit(1);
    }
}

int main(int count, char **words) {
    anyflow_bundle *bundle = NULL;
    anyflow_engine *engine = NULL;
    anyflow_tensor *text = NULL;
    anyflow_bundle_info info = ANYFLOW_INIT(anyflow_bundle_info);
    float *latents;
    size_t axes;

    if (count != 4) {
        fprintf(stderr, "usage: minimal BUNDLE EMBEDDINGS.safetensors OUTPUT.safetensors\n");
        return 2;
    }
    need(anyflow_bundle_open(words[1], NULL, &bundle));
    need(anyflow_bundle_get_info(bundle, &info));
    need(anyflow_engine_open(bundle, NULL, &engine));
    need(anyflow_tensor_load(words[2], "prompt_embeds", &text));
    const int64_t shape[5] = {1, info.frames, info.channels, info.height, info.width};
    const size_t numbers = (size_t)(info.frames * info.channels * info.height * info.width);
    if ((latents = malloc(numbers * sizeof *latents)) == NULL) return 1;
    need(anyflow_noise(0, latents, numbers));
    need(anyflow_sample(engine, latents, shape, anyflow_tensor_data(text), anyflow_tensor_shape(text, &axes), NULL, latents));
    need(anyflow_tensor_save(words[3], "latents", latents, shape, 5));
    free(latents);
    anyflow_tensor_free(text);
    anyflow_engine_close(engine);
    anyflow_bundle_close(bundle);
    return 0;
}
