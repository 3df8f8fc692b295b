"""What the callers of the toy dialogues complain of, and what the toy nurse knows. Invented; of no medical use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Complaint:
    """One reason to call. Every field is a phrase that the sentences of `grammar` are made of."""

    name: str  # "chest pain"
    said: tuple[str, ...]  # how a caller says it: "my chest hurts"
    sign: str  # the danger sign that is asked for
    present: str  # the caller has it
    absent: str  # the caller does not have it
    cause: str  # what the sign can mean
    care: tuple[str, str]  # two things to do at home
    patience: int  # days after which it should be looked at even without the sign


COMPLAINTS = (
    Complaint(
        "chest pain",
        ("my chest hurts", "I have chest pain", "I feel a pain in my chest"),
        "the pain spreads to your arm or jaw",
        "it spreads to my left arm",
        "it stays in one place",
        "a heart attack",
        ("sit down and rest", "avoid heavy work"),
        0,
    ),
    Complaint(
        "a headache",
        ("my head hurts", "I have a headache", "I have a bad headache"),
        "your neck is stiff or the light hurts your eyes",
        "my neck is very stiff",
        "my neck moves freely",
        "an infection around the brain",
        ("drink enough water", "rest in a dark room"),
        3,
    ),
    Complaint(
        "a sore throat",
        ("my throat is sore", "I have a sore throat", "it hurts when I swallow"),
        "you can no longer swallow your saliva",
        "I can not even swallow my saliva",
        "I can swallow",
        "a swelling that blocks the airway",
        ("drink warm tea", "gargle with salt water"),
        5,
    ),
    Complaint(
        "a cough",
        ("I have a cough", "I keep coughing", "I have a dry cough"),
        "you are short of breath or cough up blood",
        "I am short of breath",
        "I breathe well",
        "an infection of the lungs",
        ("drink warm tea", "do not smoke"),
        14,
    ),
    Complaint(
        "a fever",
        ("I have a fever", "my temperature is 39 degrees", "I feel hot and shiver"),
        "you are confused or hard to wake",
        "I feel confused",
        "my mind is clear",
        "an infection of the blood",
        ("drink enough water", "stay in bed"),
        3,
    ),
    Complaint(
        "stomach pain",
        ("my stomach hurts", "I have stomach pain", "I have cramps in my belly"),
        "your belly is hard or you vomit blood",
        "my belly is as hard as a board",
        "my belly is soft",
        "a bleeding or a hole in the bowel",
        ("eat light meals", "put a warm bottle on your belly"),
        2,
    ),
    Complaint(
        "back pain",
        ("my back hurts", "I have back pain", "I have a pain in my lower back"),
        "your legs are numb or you can not hold your urine",
        "my legs are numb",
        "I feel my legs",
        "a nerve that is being crushed",
        ("keep moving gently", "put something warm on your back"),
        14,
    ),
    Complaint(
        "a rash",
        ("I have a rash", "my skin itches", "I have red spots on my skin"),
        "the spots stay when you press a glass on them",
        "they stay under the glass",
        "they fade under the glass",
        "a bleeding into the skin",
        ("cool the skin", "use a plain cream"),
        7,
    ),
    Complaint(
        "dizziness",
        ("I feel dizzy", "the room is spinning", "I am dizzy when I get up"),
        "your face droops or your speech is slurred",
        "my speech is slurred",
        "I speak as usual",
        "a stroke",
        ("get up slowly", "drink enough water"),
        2,
    ),
    Complaint(
        "a cut",
        ("I cut my hand", "I have a cut on my leg", "I cut my finger with a knife"),
        "the blood keeps running after ten minutes of pressure",
        "it does not stop bleeding",
        "it has stopped bleeding",
        "a damaged artery",
        ("wash the wound with clean water", "cover it with a clean bandage"),
        1,
    ),
    Complaint(
        "a twisted ankle",
        ("I twisted my ankle", "my ankle is swollen", "I fell and hurt my ankle"),
        "you can not take four steps or the foot is numb",
        "I can not stand on it",
        "I can walk",
        "a broken bone",
        ("cool the ankle", "rest with the leg raised"),
        5,
    ),
    Complaint(
        "pain when passing water",
        ("it burns when I pass water", "I have to pass water all the time", "passing water hurts"),
        "you have a fever or pain in your side",
        "I also have a fever and my side hurts",
        "I have no fever",
        "an infection of the kidneys",
        ("drink enough water", "keep warm"),
        1,
    ),
)
