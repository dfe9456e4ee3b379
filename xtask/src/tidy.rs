//! `cargo xtask tidy`: what neither rustfmt nor clippy looks at.
//!
//! Lengths of files and functions, placeholders, Rust files that nothing includes, stray files, the changelog's
//! form. Works on text with comments and strings blanked out, not on a syntax tree: a parser would be the
//! largest dependency of the workspace for a few counts. (After TigerBeetle's tidy.zig.)

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress::output;
use crate::setup::workspace;

const MAX_FILE_LINES: usize = 800;
/// Functions must stay below this.
const FUNCTION_LINES: usize = 70;
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Placeholders and leftovers, with what to do instead.
const FORBIDDEN: [(&str, &str); 5] = [
    ("todo!", "write it, or leave it out"),
    ("unimplemented!", "write it, or leave it out"),
    ("dbg!", "remove it"),
    ("allow(dead_code)", "remove the dead code"),
    ("allow(unused", "remove what is unused"),
];
/// What may lie at the top, besides crates (directories with a Cargo.toml).
const TOP_LEVEL: [&str; 15] = [
    ".cargo",
    ".ci",
    ".config",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "dist",
    "docs",
    "examples",
    "rust-toolchain.toml",
    "rustfmt.toml",
];
const STRAY_ENDINGS: [&str; 9] = ["~", ".orig", ".rej", ".swp", ".bak", ".tmp", ".log", ".o", ".pyc"];

/// Checks every file that git tracks or would track.
///
/// # Errors
/// All findings, one per line.
pub fn tidy() -> Result<()> {
    let root = workspace();
    let listing = ["ls-files", "--cached", "--others", "--exclude-standard"];
    let listed = output(Command::new("git").current_dir(&root).args(listing))?;
    // Deleted but not yet committed files are listed too.
    let files: Vec<&str> = listed.lines().filter(|file| root.join(file).exists()).collect();
    let mut findings = Vec::new();
    for &file in &files {
        stray(&root, file, &mut findings);
        let path = root.join(file);
        let text = |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        if file.ends_with(".rs") {
            rust_text(file, &text(&path)?, &mut findings);
            if !is_included(&root, file) {
                findings.push(format!("{file}: no «mod» includes it"));
            }
        }
        if file == "CHANGELOG.md" {
            changelog(&text(&path)?, &mut findings);
        }
    }
    if findings.is_empty() {
        println!("   {} files are tidy", files.len());
        return Ok(());
    }
    findings.sort();
    bail!("{} untidy places:\n  {}", findings.len(), findings.join("\n  "))
}

fn stray(root: &Path, file: &str, findings: &mut Vec<String>) {
    let top = file.split('/').next().unwrap_or(file);
    if !TOP_LEVEL.contains(&top) && !root.join(top).join("Cargo.toml").exists() {
        findings.push(format!("{file}: «{top}» does not belong at the top (list: xtask/src/tidy.rs)"));
    }
    if STRAY_ENDINGS.iter().any(|ending| file.ends_with(ending)) {
        findings.push(format!("{file}: looks like a left-over"));
    }
    let length_bytes = fs::metadata(root.join(file)).map_or(0, |metadata| metadata.len());
    if length_bytes == 0 {
        findings.push(format!("{file}: is empty"));
    }
    if length_bytes > MAX_FILE_BYTES {
        findings.push(format!("{file}: {length_bytes} bytes; generate it or make it smaller"));
    }
}

fn rust_text(file: &str, text: &str, findings: &mut Vec<String>) {
    let lines = text.lines().count();
    if lines > MAX_FILE_LINES {
        findings.push(format!("{file}: {lines} lines, at most {MAX_FILE_LINES}; split it"));
    }
    let code = blank_comments_and_strings(text);
    for (number, line) in (1..).zip(code.lines()) {
        for (word, remedy) in FORBIDDEN {
            if line.contains(word) {
                findings.push(format!("{file}:{number}: «{word}»: {remedy}"));
            }
        }
    }
    for function in functions(&code) {
        if function.lines >= FUNCTION_LINES {
            let Function { name, line, lines } = function;
            findings.push(format!("{file}:{line}: fn {name} has {lines} lines, must be below {FUNCTION_LINES}"));
        }
    }
}

struct Function<'a> {
    name: &'a str,
    line: usize,
    lines: usize,
}

/// Functions with a body in text without comments and strings.
fn functions(code: &str) -> Vec<Function<'_>> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = code.as_bytes();
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let starts_word = at == 0 || !is_word(bytes[at - 1]);
        let rest = &code[at + 3..];
        let name = &rest[..rest.bytes().position(|byte| !is_word(byte)).unwrap_or(rest.len())];
        if !starts_word || name.is_empty() {
            continue;
        }
        if let Some(end) = body_end(rest) {
            let line = code[..at].matches('\n').count() + 1;
            found.push(Function { name, line, lines: rest[..end].matches('\n').count() + 1 });
        }
    }
    found
}

/// Where the body ends that follows a signature; None for a declaration without one.
fn body_end(signature: &str) -> Option<usize> {
    let (mut brackets, mut braces) = (0_u32, 0_u32);
    for (at, byte) in signature.bytes().enumerate() {
        match byte {
            b'(' | b'[' => brackets += 1,
            b')' | b']' => brackets = brackets.saturating_sub(1),
            b';' if brackets == 0 && braces == 0 => return None,
            b'{' => braces += 1,
            b'}' => {
                braces = braces.checked_sub(1)?;
                if braces == 0 && brackets == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

/// Replaces comments, strings and character literals by blanks; lines stay where they are.
fn blank_comments_and_strings(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = literal_or_comment(rest, code.chars().next_back());
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..skipped].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[skipped..];
        }
    }
    code
}

/// Bytes of the comment or literal that `text` begins with, or 0.
fn literal_or_comment(text: &str, before: Option<char>) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return block_comment(text);
    }
    if let Some(string) = text.strip_prefix('"') {
        return 1 + quoted(string, '"');
    }
    let begins_word = !before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if begins_word && text.starts_with('r') {
        let hashes = text[1..].bytes().take_while(|&byte| byte == b'#').count();
        if text[1 + hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let start = 2 + hashes;
            return text[start..].find(&close).map_or(text.len(), |at| start + at + close.len());
        }
    }
    if let Some(literal) = text.strip_prefix('\'') {
        // 'a' and '\n' are literals, 'a alone is a lifetime.
        let mut inside = literal.chars();
        let first = inside.next();
        if first == Some('\\') || inside.next() == Some('\'') {
            return 1 + quoted(literal, '\'');
        }
    }
    0
}

/// Bytes up to and with the closing quote.
fn quoted(text: &str, close: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == close => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0_u32;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// Whether a `mod` line of the file above includes this one. Roots of crates and programs count as included.
fn is_included(root: &Path, file: &str) -> bool {
    let path = Path::new(file);
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let Some(directory) = path.parent() else {
        return true;
    };
    let directory_name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let is_module = directory.components().any(|part| part.as_os_str() == "src" || part.as_os_str() == "tests");
    let is_root = matches!(directory_name, "bin" | "tests" | "examples" | "benches")
        || (directory_name == "src" && matches!(stem, "main" | "lib"))
        // tests/NAME/main.rs is a test binary of its own.
        || (stem == "main" && directory.parent().is_some_and(|above| above.ends_with("tests")));
    if !is_module || is_root {
        return true;
    }
    // mod.rs stands for its directory.
    let (module, above) =
        if stem == "mod" { (directory_name, directory.parent().unwrap_or(directory)) } else { (stem, directory) };
    let beside = above.with_extension("rs");
    let parents = [above.join("lib.rs"), above.join("main.rs"), above.join("mod.rs"), beside];
    let in_tests = above.file_name().is_some_and(|name| name == "tests");
    let includes = |parent: &Path| {
        let text = fs::read_to_string(root.join(parent)).unwrap_or_default();
        text.lines().any(|line| line.trim_end().ends_with(&format!("mod {module};")))
    };
    let any_test_includes = || {
        let tests = fs::read_dir(root.join(above)).into_iter().flatten().flatten();
        tests.map(|entry| entry.path()).any(|path| path.is_file() && includes(&path))
    };
    parents.iter().any(|parent| includes(parent)) || (in_tests && any_test_includes())
}

/// «# Changelog», then «## Unreleased» or «## 1.2.3 (2026-01-31)», under each only items «* » with indented
/// continuation lines.
fn changelog(text: &str, findings: &mut Vec<String>) {
    let mut wrong = |number: usize, what: &str| findings.push(format!("CHANGELOG.md:{number}: {what}"));
    if text.lines().next() != Some("# Changelog") {
        wrong(1, "must begin with «# Changelog»");
    }
    let mut in_section = false;
    for (number, line) in (1..).zip(text.lines()).skip(1) {
        if let Some(title) = line.strip_prefix("## ") {
            in_section = true;
            if title != "Unreleased" && !is_release(title) {
                wrong(number, "a section is «## Unreleased» or «## 1.2.3 (2026-01-31)»");
            }
        } else if in_section && !line.is_empty() && !line.starts_with("* ") && !line.starts_with("  ") {
            wrong(number, "a section has items «* …» with indented continuation lines");
        }
    }
}

fn is_release(title: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((version, date)) = title.split_once(" (") else {
        return false;
    };
    let Some(date) = date.strip_suffix(')') else {
        return false;
    };
    let lengths: Vec<usize> = date.split('-').map(str::len).collect();
    version.split('.').count() == 3
        && version.split('.').all(digits)
        && lengths == [4, 2, 2]
        && date.split('-').all(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings_in(text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        rust_text("x.rs", text, &mut findings);
        findings
    }

    #[test]
    fn lengths_are_counted_from_signature_to_closing_brace() {
        let body = "    step();\n".repeat(FUNCTION_LINES - 4);
        let fits = format!("fn fits(\n) {{\n{body}}}\n");
        assert_eq!(findings_in(&fits), Vec::<String>::new());
        let long = fits.replace("    step();\n}", "    step();\n    step();\n}");
        assert_eq!(findings_in(&long), [format!("x.rs:1: fn fits has {FUNCTION_LINES} lines, must be below 70")]);
        assert_eq!(findings_in(&"//\n".repeat(MAX_FILE_LINES)), Vec::<String>::new());
        assert_eq!(findings_in(&"//\n".repeat(MAX_FILE_LINES + 1)).len(), 1);
    }

    #[test]
    fn braces_in_strings_comments_and_characters_do_not_count() {
        let text =
            "fn a() { let b = '{'; let c = \"}}{\\\"{\"; /* { /* { */ */ let d: &'static str = r#\"{\"{\"#; } // {\n";
        let code = blank_comments_and_strings(text);
        let found = functions(&code);
        assert_eq!(found.len(), 1, "{code}");
        assert_eq!((found[0].name, found[0].lines), ("a", 1));
        assert_eq!(code.lines().count(), text.lines().count());
    }

    #[test]
    fn declarations_and_array_types_do_not_confuse() {
        let code = "trait T { fn none(&self, a: [u8; 4]); }\nfn some(a: [u8; 4]) -> u8 {\n    a[0]\n}\n";
        let found: Vec<_> = functions(code).into_iter().map(|f| (f.name, f.lines)).collect();
        assert_eq!(found, [("some", 3)]);
    }

    #[test]
    fn placeholders_are_found_in_code_only() {
        assert_eq!(findings_in("// todo!\nconst A: &str = \"todo!\";\n"), Vec::<String>::new());
        assert_eq!(findings_in("fn a() {\n    todo!()\n}\n"), ["x.rs:2: «todo!»: write it, or leave it out"]);
        assert_eq!(findings_in("#[allow(dead_code)]\nstruct A;\n").len(), 1);
    }

    #[test]
    fn the_changelog_has_one_form() {
        let check = |text: &str| {
            let mut findings = Vec::new();
            changelog(text, &mut findings);
            findings.len()
        };
        assert_eq!(
            check("# Changelog\n\nWords.\n\n## Unreleased\n\n* one\n  more\n\n## 0.1.0 (2026-01-31)\n\n* two\n"),
            0
        );
        assert_eq!(check("# Changes\n"), 1);
        assert_eq!(check("# Changelog\n\n## 0.1\n- one\n"), 2);
    }
}
