//! What the tiny world talks about: topics, their words, and how a question is put and answered.
//!
//! Owns the words. Refuses everything about messages and files. The one idea: some answers are certain (sums, opposites,
//! homes of animals), some are a matter of taste with fixed odds (a fruit, the colour of an apple, the form of a sentence),
//! so that a model trained on them has distributions worth distilling.

use super::dice::Dice;

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// What the user says.
    pub question: String,
    /// What the assistant says.
    pub answer: String,
}

/// How the assistant was asked to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Whole sentences.
    Sentences,
    /// The bare answer.
    Brief,
}

const NUMBERS: [&str; 21] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
];
/// Thing, its usual colour, a colour it has sometimes, a colour it has seldom.
const COLOURS: [(&str, [&str; 3]); 12] = [
    ("apple", ["red", "green", "yellow"]),
    ("lemon", ["yellow", "yellow", "green"]),
    ("leaf", ["green", "brown", "red"]),
    ("sky", ["blue", "grey", "black"]),
    ("crow", ["black", "black", "black"]),
    ("rose", ["red", "white", "pink"]),
    ("cat", ["black", "grey", "white"]),
    ("swan", ["white", "white", "black"]),
    ("carrot", ["orange", "orange", "purple"]),
    ("bear", ["brown", "black", "white"]),
    ("coal", ["black", "black", "grey"]),
    ("sea", ["blue", "green", "grey"]),
];
/// Animal (plural), its home, its sound, its legs.
const ANIMALS: [(&str, &str, &str, usize); 10] = [
    ("bees", "hive", "buzz", 6),
    ("foxes", "den", "bark", 4),
    ("birds", "nest", "sing", 2),
    ("horses", "stable", "neigh", 4),
    ("dogs", "kennel", "bark", 4),
    ("spiders", "web", "say nothing", 8),
    ("cows", "barn", "moo", 4),
    ("ants", "hill", "say nothing", 6),
    ("owls", "tree", "hoot", 2),
    ("pigs", "sty", "grunt", 4),
];
const OPPOSITES: [(&str, &str); 12] = [
    ("hot", "cold"),
    ("big", "small"),
    ("day", "night"),
    ("old", "new"),
    ("wet", "dry"),
    ("fast", "slow"),
    ("up", "down"),
    ("open", "closed"),
    ("light", "dark"),
    ("early", "late"),
    ("full", "empty"),
    ("loud", "quiet"),
];
const FRUITS: [&str; 8] = ["apple", "lemon", "pear", "plum", "grape", "peach", "cherry", "melon"];
const WORDS: [&str; 16] =
    ["red", "cat", "sky", "hot", "tree", "rose", "old", "sea", "bear", "day", "leaf", "new", "plum", "nest", "web", "coal"];

/// One to three exchanges about a topic drawn by chance.
pub fn exchanges(manner: Manner, dice: &mut Dice) -> Vec<Exchange> {
    match dice.below(10) {
        0 | 1 => sum(manner, dice),
        2 => count(dice),
        3 => colour(manner, dice),
        4 | 5 => animal(manner, dice),
        6 => opposite(manner, dice),
        7 => reverse(manner, dice),
        8 => taste(manner, dice),
        _ => greeting(dice),
    }
}

/// The last word of a conversation.
pub fn farewell(dice: &mut Dice) -> Exchange {
    let question = dice.lean(["Thank you.", "Thanks, goodbye.", "That is all, thank you."]);
    let answer = dice.lean(["You are welcome.", "My pleasure. Goodbye!", "Gladly. Come back soon."]);
    exchange(question, answer)
}

/// Addition, with a follow-up that builds on the result.
fn sum(manner: Manner, dice: &mut Dice) -> Vec<Exchange> {
    let (a, b) = (dice.below(9), dice.below(9));
    let asked = match dice.below(3) {
        0 => format!("What is {} plus {}?", NUMBERS[a], NUMBERS[b]),
        1 => format!("Add {} and {}.", NUMBERS[a], NUMBERS[b]),
        _ => format!("How much is {} and {}?", NUMBERS[a], NUMBERS[b]),
    };
    let told = format!("{} plus {} is {}.", capital(NUMBERS[a]), NUMBERS[b], NUMBERS[a + b]);
    let mut talk = vec![Exchange { question: asked, answer: spoken(manner, told, NUMBERS[a + b]) }];
    if dice.chance(50) {
        let more = 1 + dice.below(3);
        let question = format!("And {} more?", NUMBERS[more]);
        let told = format!("That makes {}.", NUMBERS[a + b + more]);
        talk.push(Exchange { question, answer: spoken(manner, told, NUMBERS[a + b + more]) });
    }
    talk
}

fn count(dice: &mut Dice) -> Vec<Exchange> {
    let first = dice.below(10);
    let last = first + 2 + dice.below(4);
    if dice.chance(70) {
        let question = format!("Count from {} to {}.", NUMBERS[first], NUMBERS[last]);
        vec![Exchange { question, answer: format!("{}.", capital(&NUMBERS[first..=last].join(", "))) }]
    } else {
        let question = format!("Count down from {} to {}.", NUMBERS[last], NUMBERS[first]);
        let down: Vec<&str> = NUMBERS[first..=last].iter().rev().copied().collect();
        vec![Exchange { question, answer: format!("{}.", capital(&down.join(", "))) }]
    }
}

fn colour(manner: Manner, dice: &mut Dice) -> Vec<Exchange> {
    let (thing, colours) = *dice.pick(&COLOURS);
    let colour = dice.lean(colours);
    let question = match dice.lean([0, 1, 2]) {
        0 => format!("What colour is the {thing}?"),
        1 => format!("Which colour has the {thing}?"),
        _ => format!("Tell me the colour of the {thing}."),
    };
    let told = match dice.below(2) {
        0 => format!("The {thing} is {colour}."),
        _ => format!("The {thing} is often {colour}."),
    };
    vec![Exchange { question, answer: spoken(manner, told, colour) }]
}

/// Where an animal lives, then perhaps how it sounds or how many legs it has ("they" must be looked up in the text).
fn animal(manner: Manner, dice: &mut Dice) -> Vec<Exchange> {
    let (animal, home, sound, legs) = *dice.pick(&ANIMALS);
    let question = format!("Where do {animal} live?");
    let told = format!("{} live in a {home}.", capital(animal));
    let mut talk = vec![Exchange { question, answer: spoken(manner, told, &format!("a {home}")) }];
    if dice.chance(40) {
        let answer = spoken(manner, format!("They {sound}."), sound);
        talk.push(Exchange { question: "What do they say?".into(), answer });
    }
    if dice.chance(40) {
        let answer = spoken(manner, format!("They have {} legs.", NUMBERS[legs]), NUMBERS[legs]);
        talk.push(Exchange { question: "How many legs do they have?".into(), answer });
    }
    talk
}

fn opposite(manner: Manner, dice: &mut Dice) -> Vec<Exchange> {
    let (left, right) = *dice.pick(&OPPOSITES);
    let (from, to) = if dice.chance(50) { (left, right) } else { (right, left) };
    let question = match dice.below(2) {
        0 => format!("What is the opposite of {from}?"),
        _ => format!("Please give me the opposite of {from}."),
    };
    vec![Exchange { question, answer: spoken(manner, format!("The opposite of {from} is {to}."), to) }]
}

/// Three words said backwards, or put into the order of the alphabet.
fn reverse(manner: Manner, dice: &mut Dice) -> Vec<Exchange> {
    let mut deck = WORDS;
    dice.shuffle(&mut deck);
    let [a, b, c, ..] = deck;
    let (task, ordered) = if dice.chance(60) {
        ("Reverse", [c, b, a])
    } else {
        let mut sorted = [a, b, c];
        sorted.sort_unstable();
        ("Sort", sorted)
    };
    let ordered = ordered.join(" ");
    let told = format!("Here you are: {ordered}.");
    vec![Exchange { question: format!("{task} the words {a} {b} {c}."), answer: spoken(manner, told, &ordered) }]
}

/// A question with eight right answers.
fn taste(manner: Manner, dice: &mut Dice) -> Vec<Exchange> {
    let fruit = *dice.pick(&FRUITS);
    let question = dice.lean(["Name a fruit.", "Which fruit do you like?", "What shall I eat?"]);
    let told = match dice.lean([0, 1, 2]) {
        0 => format!("I would take the {fruit}."),
        1 => format!("Perhaps the {fruit}."),
        _ => format!("The {fruit} is good today."),
    };
    vec![Exchange { question: question.into(), answer: spoken(manner, told, fruit) }]
}

fn greeting(dice: &mut Dice) -> Vec<Exchange> {
    match dice.below(3) {
        0 => vec![exchange(
            dice.lean(["Hello!", "Good morning.", "Hi there."]),
            dice.lean(["Hello! What can I do for you?", "Good day to you.", "Hi! Ask me anything."]),
        )],
        1 => vec![exchange("Who are you?", dice.lean(["I am a small model.", "A small model, made today.", "Only a model."]))],
        _ => vec![exchange("How are you?", dice.lean(["I am well, thank you.", "Very well. And you?", "A little tired today."]))],
    }
}

fn exchange(question: &str, answer: &str) -> Exchange {
    Exchange { question: question.into(), answer: answer.into() }
}

fn spoken(manner: Manner, sentence: String, bare: &str) -> String {
    match manner {
        Manner::Sentences => sentence,
        Manner::Brief => format!("{}.", capital(bare)),
    }
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
