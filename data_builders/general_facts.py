"""Questions about no image whose answers everybody knows: what an edit of an image must not touch.

Each stands with the word that a right answer holds. Which of them a model truly answers it is asked
(`data_builders.clipart_edits`): the sentence that it writes is then the answer to be kept.
"""

from __future__ import annotations

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo",
    "England": "London", "Russia": "Moscow", "China": "Beijing", "Egypt": "Cairo",
    "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Canada": "Ottawa",
    "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Cuba": "Havana",
}  # fmt: skip
OTHERS = {
    "What is the largest planet in the solar system?": "Jupiter",
    "Which planet is known as the red planet?": "Mars",
    "What is the largest ocean on Earth?": "Pacific",
    "What is the tallest mountain in the world?": "Everest",
    "What is the longest river in Africa?": "Nile",
    "What is the chemical symbol for gold?": "Au",
    "Who painted the Mona Lisa?": "Leonardo",
    "Who invented the telephone?": "Bell",
    "Who wrote The Odyssey?": "Homer",
    "How many days are there in a week?": "7",
    "How many legs does a spider have?": "8",
    "How many continents are there?": "7",
    "What is the currency of Japan?": "yen",
    "What is the currency of the United Kingdom?": "pound",
    "What is the freezing point of water in Celsius?": "0",
    "What is the boiling point of water in Celsius?": "100",
    "What gas do plants absorb from the air?": "carbon dioxide",
    "What is the largest animal on Earth?": "blue whale",
    "What is the fastest land animal?": "cheetah",
    "What language is spoken in Mexico?": "Spanish",
    "What language is spoken in Germany?": "German",
    "What is the main language of France?": "French",
    "What is the first month of the year?": "January",
    "What is the opposite of hot?": "cold",
    "What is the opposite of up?": "down",
    "What is frozen water called?": "ice",
    "What do bees make?": "honey",
    "Which star is at the center of the solar system?": "Sun",
    "Who was the first man on the moon?": "Armstrong",
    "In which country is the Eiffel Tower?": "France",
    "In which city is the Colosseum?": "Rome",
    "In which country are the pyramids of Giza?": "Egypt",
    "In which city is the Statue of Liberty?": "New York",
    "Which country is famous for kangaroos?": "Australia",
    "What is the process by which plants make food?": "photosynthesis",
    "Which force pulls objects to the ground?": "gravity",
    "What is the study of living things called?": "biology",
}


def facts() -> dict[str, str]:
    """Question -> the word that a right answer holds."""
    return {f"What is the capital of {land}?": city for land, city in CAPITALS.items()} | OTHERS


def is_right(answer: str, word: str) -> bool:
    """Whether an answer holds the word as a word, in any case."""
    import re

    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None
