//! The same figures under the names that vLLM gives them, for dashboards, load balancers and
//! benchmarks that know only those.
//!
//! Input: what [`super::Metrics`] gathered under Foretoken's names. Nothing is counted twice.

use prometheus::proto::{LabelPair, MetricFamily};

/// Foretoken's name and vLLM's.
const NAMES: [(&str, &str); 25] = [
    ("foretoken_requests_running", "vllm:num_requests_running"),
    ("foretoken_requests_waiting", "vllm:num_requests_waiting"),
    ("foretoken_kv_usage_ratio", "vllm:kv_cache_usage_perc"),
    ("foretoken_preemptions_total", "vllm:num_preemptions_total"),
    ("foretoken_prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("foretoken_generation_tokens_total", "vllm:generation_tokens_total"),
    ("foretoken_requests_ended_total", "vllm:request_success_total"),
    ("foretoken_drafts_total", "vllm:spec_decode_num_drafts_total"),
    ("foretoken_draft_tokens_total", "vllm:spec_decode_num_draft_tokens_total"),
    ("foretoken_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"),
    (
        "foretoken_accepted_tokens_by_position_total",
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    ),
    ("foretoken_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    ("foretoken_inter_token_seconds", "vllm:inter_token_latency_seconds"),
    ("foretoken_request_seconds", "vllm:e2e_request_latency_seconds"),
    ("foretoken_request_prompt_tokens", "vllm:request_prompt_tokens"),
    ("foretoken_request_generation_tokens", "vllm:request_generation_tokens"),
    ("foretoken_prefix_queried_tokens_total", "vllm:prefix_cache_queries_total"),
    ("foretoken_prefix_cached_tokens_total", "vllm:prefix_cache_hits_total"),
    ("foretoken_prefix_cached_tokens_total", "vllm:prompt_tokens_cached_total"),
    ("foretoken_step_tokens", "vllm:iteration_tokens_total"),
    ("foretoken_request_queue_seconds", "vllm:request_queue_time_seconds"),
    ("foretoken_request_prefill_seconds", "vllm:request_prefill_time_seconds"),
    ("foretoken_request_decode_seconds", "vllm:request_decode_time_seconds"),
    ("foretoken_request_inference_seconds", "vllm:request_inference_time_seconds"),
    ("foretoken_request_time_per_token_seconds", "vllm:request_time_per_output_token_seconds"),
];

/// `families` and behind them their aliases, labelled with the model's name.
pub(super) fn with_aliases(mut families: Vec<MetricFamily>, model: &str) -> Vec<MetricFamily> {
    let alias = |(own, alias): &(&str, &str)| {
        let family = families.iter().find(|family| family.name() == *own)?;
        Some(aliased(family, alias, model))
    };
    let aliases: Vec<MetricFamily> = NAMES.iter().filter_map(alias).collect();
    families.extend(aliases);
    families
}

fn aliased(family: &MetricFamily, alias: &str, model: &str) -> MetricFamily {
    let mut family = family.clone();
    family.set_name(alias.to_owned());
    for metric in family.mut_metric() {
        let mut label = LabelPair::default();
        label.set_name("model_name".to_owned());
        label.set_value(model.to_owned());
        let mut labels = metric.take_label();
        labels.insert(0, label);
        metric.set_label(labels);
    }
    family
}
