//! A tiny tokenizer, teacher, student and chats, made from nothing.
