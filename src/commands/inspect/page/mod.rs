//! `--html FILE`: one self-contained page of a cache, to be opened offline and passed on.
//!
//! Plots and figures stand in the page as SVG and text; conversations lie in it as compressed numbers, which its script draws. What
//! comes from the data reaches the page in two ways only: through [`escaped`], or in base64, from where the script sets it as
//! text. A content security policy allows the page's own script and style and nothing else, no network in particular.

mod payload;
mod plots;

use super::summary;
use super::vocabulary::Vocabulary;
use crate::cli::{self, Manner};
use crate::commands::scanned;
use crate::exit::UsageError;
use crate::print;
use crate::text;
use anyhow::Context;
use flate2::Compression;
use flate2::write::GzEncoder;
use potstill_cache::{Cache, Summary};
use potstill_pipeline::whole_file;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::path::Path;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("page.js");
/// How every page begins; a file that does not is none of ours and is not overwritten.
const OPENING: &str = "<!DOCTYPE html>\n<!-- potstill inspect -->\n";
/// Stands for the nonce until the rest of the page is known.
const NONCE: &str = "{nonce}";

/// What was written.
#[derive(Serialize)]
pub struct Page {
    file: std::path::PathBuf,
    bytes: u64,
    /// Conversations in it.
    conversations: u64,
    /// Rows of the cache.
    rows: u64,
}

/// Writes the page.
pub fn run(cache: &Cache, file: &Path, flags: &cli::Inspect, manner: Manner) -> anyhow::Result<()> {
    refuse_foreign(file)?;
    let vocabulary = Vocabulary::of(cache)?;
    let figures = scanned("reading", manner, |scan| Summary::of(cache, scan))?;
    let rows = payload::chosen(cache, &figures, flags.sample);
    let payload = payload::of(cache, &rows, &vocabulary, flags.top)?;
    let page = with_nonce(&assembled(cache, &figures, rows.len(), &base64(&gzip(payload.as_bytes())?)));
    whole_file::write(file, page.as_bytes()).with_context(|| format!("{}: cannot write", file.display()))?;
    let done = Page { file: file.to_path_buf(), bytes: page.len() as u64, conversations: rows.len() as u64, rows: figures.rows };
    if manner.json {
        print::json(&done)?;
    } else {
        let (shown, of) = (print::count(done.conversations), print::plural(done.rows, "conversation"));
        let mut out = print::out();
        writeln!(out, "{}: {}, {shown} of {of}", text::visible(&file.display().to_string()), print::bytes(done.bytes))?;
        out.flush()?;
    }
    Ok(())
}

/// Refuses to put a page in the place of a file that is no page.
fn refuse_foreign(file: &Path) -> anyhow::Result<()> {
    let mut opening = Vec::new();
    match std::fs::File::open(file) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        opened => opened
            .and_then(|found| found.take(OPENING.len() as u64).read_to_end(&mut opening))
            .with_context(|| format!("{}: cannot read", file.display()))?,
    };
    if opening == OPENING.as_bytes() {
        return Ok(());
    }
    Err(UsageError(format!("{}: expected a new file or an earlier page, found another file", file.display())).into())
}

fn gzip(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let letter = ALPHABET.get((word >> (18 - 6 * i) & 63) as usize).copied().unwrap_or(b'A');
            out.push(if i > three.len() { '=' } else { char::from(letter) });
        }
    }
    out
}

/// Text of one line for a page: nothing in it acts on the markup or on the order of what stands around it.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text::visible(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Puts in the nonce, a digest of everything else: no text within the page can know it.
fn with_nonce(page: &str) -> String {
    page.replace(NONCE, &blake3::hash(page.as_bytes()).to_hex().as_str()[..32])
}

fn assembled(cache: &Cache, figures: &Summary, conversations: usize, payload: &str) -> String {
    let name = cache.dir().file_name().map_or_else(|| "cache".into(), |name| name.to_string_lossy().into_owned());
    let name = harmless(&name);
    let mut out = OPENING.to_string();
    let policy =
        format!("default-src 'none'; style-src 'nonce-{NONCE}'; script-src 'nonce-{NONCE}'; base-uri 'none'; form-action 'none'");
    let _ = write!(
        out,
        "<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{name} · potstill</title>\n<style nonce=\"{NONCE}\">\n{STYLE}</style>\n</head>\n<body>\n"
    );
    out.push_str(&header(&name, cache, figures));
    out.push_str(&plots::section(figures));
    out.push_str(&conversation_section(conversations, figures.rows));
    out.push_str(&details(cache, figures));
    out.push_str(
        "<footer>Made by potstill inspect --html. This page is complete in itself and asks no network for anything.</footer>\n",
    );
    let _ = write!(
        out,
        "<script type=\"text/plain\" id=\"payload\">{payload}</script>\n<script nonce=\"{NONCE}\">\n{SCRIPT}</script>\n</body>\n</html>\n"
    );
    out
}

/// The same for what stands outside the script: the one text of ours that looks for {nonce} must not find it in the data.
fn harmless(text: &str) -> String {
    escaped(text).replace('{', "&#123;")
}

fn header(name: &str, cache: &Cache, figures: &Summary) -> String {
    let teacher = harmless(&cache.manifest().description.teacher.name);
    let mut tiles = vec![
        ("conversations", print::count(figures.rows)),
        ("scored positions", print::count(figures.scored)),
        ("bytes a position", figures.bytes_per_scored.map_or_else(|| "–".into(), |bytes| format!("{bytes:.1}"))),
    ];
    if let Some(kept) = figures.distributions.as_ref().and_then(|d| d.kept.as_ref()) {
        tiles.push(("first choice came", format!("{:.1}%", 100.0 * kept.top1_is_next)));
        tiles.push(("perplexity, at least", summary::perplexity(kept.perplexity_at_least)));
        tiles.push(("mean entropy, nats", format!("{:.2}", kept.mean_entropy)));
    }
    let tiles: String = tiles.iter().map(|(name, value)| format!("<div><dt>{name}</dt><dd>{value}</dd></div>\n")).collect();
    format!(
        "<header>\n<div class=\"title\">\n<h1>{name}</h1>\n\
         <button type=\"button\" id=\"theme\" aria-label=\"Switch between light and dark\" title=\"Light or dark\">◐</button>\n</div>\n\
         <p>What <strong>{teacher}</strong> expected after each token, and what came.</p>\n<dl class=\"tiles\">\n{tiles}</dl>\n</header>\n"
    )
}

fn conversation_section(shown: usize, rows: u64) -> String {
    let of = if shown as u64 == rows {
        format!("All {}", print::plural(rows, "conversation"))
    } else {
        format!(
            "{} of {} conversations: the most surprising, and others evenly spaced",
            print::count(shown as u64),
            print::count(rows)
        )
    };
    format!(
        "<section id=\"conversations\" aria-label=\"Conversations\">\n<h2>Token by token</h2>\n<p class=\"note\">{of}.</p>\n\
         <noscript><p class=\"note\">Conversations are drawn by this page's script, which is switched off.</p></noscript>\n\
         <div id=\"app\" hidden></div>\n</section>\n"
    )
}

/// All that is said in words, and the size by column.
fn details(cache: &Cache, figures: &Summary) -> String {
    let place = cache.dir().display().to_string();
    let facts = summary::facts(cache, figures);
    // Where the cache lay says nothing to whom the page is passed on.
    let facts: String = facts
        .iter()
        .filter(|(name, value)| *name != "cache" || *value != place)
        .map(|(name, value)| format!("<div><dt>{}</dt><dd>{}</dd></div>\n", harmless(name), harmless(value)))
        .collect();
    format!(
        "<section id=\"details\">\n<h2>What this cache is</h2>\n<div class=\"details\">\n<dl class=\"facts\">\n{facts}</dl>\n\
         <div class=\"table\"><table>\n<thead><tr><th>column</th><th class=\"number\">bytes</th><th class=\"number\">share</th>\
         <th class=\"share\"></th><th class=\"number\">before zstd</th><th class=\"number\">ratio</th></tr></thead>\n\
         <tbody>\n{}</tbody>\n</table></div>\n</div>\n</section>\n",
        sizes(figures)
    )
}

/// Rows of the table of sizes.
fn sizes(figures: &Summary) -> String {
    let row = |name: &str, bytes: u64, before: Option<u64>| {
        let share = if figures.bytes == 0 { 0.0 } else { bytes as f64 / figures.bytes as f64 };
        let before_shown = before.map(print::bytes).unwrap_or_default();
        let ratio = before.filter(|_| bytes > 0).map(|before| format!("{:.2}", before as f64 / bytes as f64)).unwrap_or_default();
        format!(
            "<tr><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td><td class=\"share\">\
             <svg viewBox=\"0 0 100 8\" preserveAspectRatio=\"none\" aria-hidden=\"true\"><rect class=\"bar\" width=\"{:.2}\" \
             height=\"8\"/></svg></td><td class=\"number\">{before_shown}</td><td class=\"number\">{ratio}</td></tr>\n",
            harmless(name),
            print::bytes(bytes),
            print::percent(share),
            100.0 * share
        )
    };
    let columns = figures.columns.iter().map(|c| row(&c.name, c.compressed, Some(c.uncompressed)));
    columns.chain([row("(footers)", figures.other_bytes, None)]).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        // RFC 4648, section 10.
        let words = ["", "f", "fo", "foo", "foob", "fooba", "foobar"];
        let expected = ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"];
        assert_eq!(words.map(|word| base64(word.as_bytes())), expected);
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn text_cannot_act_on_the_page() {
        let hostile = "</script><img src=x onerror='a()'>\u{202e}&amp;\u{2028}\u{1b}\"";
        assert_eq!(
            escaped(hostile),
            "&lt;/script&gt;&lt;img src=x onerror=&#39;a()&#39;&gt;\\u{202e}&amp;amp;\\u{2028}\\u{1b}&quot;"
        );
        assert_eq!(harmless("{nonce}"), "&#123;nonce}");
    }

    #[test]
    fn only_pages_are_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("page.html");
        refuse_foreign(&file).expect("a new file");
        whole_file::write(&file, format!("{OPENING}...").as_bytes()).expect("written");
        refuse_foreign(&file).expect("a page");
        std::fs::write(&file, "{\"messages\": []}").expect("written");
        let error = refuse_foreign(&file).expect_err("somebody's file");
        assert!(error.is::<UsageError>() && error.to_string().contains("found another file"), "{error}");
    }
}
