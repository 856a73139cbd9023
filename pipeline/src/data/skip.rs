//! Why a row holds nothing to learn from. The words are stable: they are stored in caches and printed in reports.

/// Reasons to skip a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Skip {
    /// The list of messages is empty.
    NoMessages,
    /// Nobody to learn from.
    NoAssistant,
    /// A message without text, or a rendering without a token.
    EmptyText,
    /// The assistant calls tools, which this program does not train on.
    ToolCalls,
    /// The limit cut away all that was scored.
    NothingLeft,
    /// The template leaves out all that the assistant says.
    NothingScored,
    /// A role nobody knows.
    UnknownRole,
    /// Two users in a row, two assistants in a row, or a system message that is not the first.
    RoleOrder,
    /// The template called `raise_exception`.
    Refused,
    /// Same ids and same scored positions as an earlier row.
    Duplicate,
}

impl Skip {
    /// The stable words.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Skip::NoMessages => "no messages",
            Skip::NoAssistant => "no assistant message",
            Skip::EmptyText => "empty text",
            Skip::ToolCalls => "tool calls",
            Skip::NothingLeft => "nothing left after truncation",
            Skip::NothingScored => "nothing scored by the template",
            Skip::UnknownRole => "unknown role",
            Skip::RoleOrder => "roles out of order",
            Skip::Refused => "refused by the template",
            Skip::Duplicate => "duplicate of an earlier row",
        }
    }
}
