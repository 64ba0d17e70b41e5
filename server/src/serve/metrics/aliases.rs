//! The same figures under the names that vLLM gives them, for dashboards, load balancers and
//! benchmarks that know only those.
//!
//! Input: what [`super::Metrics`] gathered under Foretoken's names. Nothing is counted twice.

use prometheus::proto::{LabelPair, MetricFamily};

/// Foretoken's name and vLLM's.
const NAMES: [(&str, &str); 16] = [
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
];

/// `families` and behind them their aliases, labelled with the model's name.
pub(super) fn with_aliases(mut families: Vec<MetricFamily>, model: &str) -> Vec<MetricFamily> {
    let named = |family: &MetricFamily| {
        let alias = NAMES.iter().find(|(own, _)| *own == family.name())?.1;
        Some(aliased(family, alias, model))
    };
    let aliases: Vec<MetricFamily> = families.iter().filter_map(named).collect();
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
