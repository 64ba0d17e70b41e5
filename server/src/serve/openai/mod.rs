//! The OpenAI API's JSON: what requests say, what answers say.
//!
//! [`params`] are the parameters that completions and chats share, [`choices`] runs one or several
//! continuations of them. Not here: how tokens come about.

pub(crate) mod calls;
pub(crate) mod chat;
pub(crate) mod choices;
pub(crate) mod completions;
pub(crate) mod conversation;
pub(crate) mod embeddings;
pub(crate) mod forced;
pub(crate) mod format;
pub(crate) mod likelihood;
pub(crate) mod models;
pub(crate) mod params;
pub(crate) mod report;
pub(crate) mod tools;
pub(crate) mod usage;
