// ik_llama.cpp behind functions of numbers and pointers. Its structures are other than llama.cpp's
// and change often, so this is compiled against the headers of the library that it is used with.

#include <cstdint>
#include <vector>

#include "llama.h"

extern "C" {

// Null where the file cannot be read. Matrices are rearranged as they are loaded, several rows to a
// group (IQ2_BN to IQ2_BN_R4), in memory of its own.
llama_model* Open(const char* path) {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_model_params settings = llama_model_default_params();
  settings.use_mmap = false;
  settings.repack_tensors = true;
  return llama_model_load_from_file(path, settings);
}

int32_t VocabularySize(const llama_model* model) { return llama_n_vocab(model); }

// A cache for so many tokens of all sequences together; type: a ggml_type. Null without memory.
llama_context* NewContext(llama_model* model, int32_t tokens, int32_t batch, int32_t sequences,
                          int32_t threads, int32_t type) {
  llama_context_params settings = llama_context_default_params();
  settings.n_ctx = tokens;
  settings.n_batch = settings.n_ubatch = batch;
  settings.n_seq_max = sequences;
  settings.n_threads = settings.n_threads_batch = threads;
  settings.type_k = settings.type_v = static_cast<ggml_type>(type);
  return llama_init_from_model(model, settings);
}

void Clear(llama_context* context) { llama_kv_cache_clear(context); }

// The next tokens of sequences, at positions; wanted: whether there shall be logits after each one.
// Gives llama_decode's status, 0 if all is well.
int32_t Decode(llama_context* context, int32_t count, int32_t* tokens, int32_t* positions,
               int32_t* sequences, int8_t* wanted) {
  std::vector<int32_t> ones(count, 1);
  std::vector<int32_t*> each(count);
  for (int32_t i = 0; i < count; ++i) each[i] = sequences + i;
  llama_batch batch = {};
  batch.n_tokens = count;
  batch.token = tokens;
  batch.pos = positions;
  batch.n_seq_id = ones.data();
  batch.seq_id = each.data();
  batch.logits = wanted;
  return llama_decode(context, batch);
}

// Those after token i of the last call.
float* Logits(llama_context* context, int32_t i) { return llama_get_logits_ith(context, i); }
}
