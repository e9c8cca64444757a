"""Word lists by which the metadata of Open Clip Art drawings becomes plain English text.

Kept apart from the code that uses them: they are data, found by reading the 7,458 records.
"""

from __future__ import annotations

# Keywords that name a file system place, a tool or a collection, not what is drawn.
KEYWORD_JUNK = frozenset(
    """hash computer icons icon theme themes lemon theme icon lemon_theme_icon action actions
    application applications unsorted magick geometry shapes signs_and_symbols mapsym openclipart
    special webpage mimetypes mime-types filesystem filesystems menu appicon stock musicstuff
    recreation people office education transportation activities miscellany svg png inkscape
    clipart clip art various symbolsym networksym musicsym weathersym arrowshape xfig vector
    image drawing graphic picture desktop device devices sign shape symbol symbols tool tools
    desserts flags states home creation study place container transport decorations
    unitednationsmember united_nations_member public domain none signalflag roadsign
    subnational""".split()
)

# Folders whose own name says nothing of the drawing.
FOLDER_JUNK = frozenset(
    """unsorted special computer icons actions action apps applications mimetypes filesystems
    stock etiquette-theme flat-theme lemon-theme gold-theme blueberry-theme device devices shapes
    signs_and_symbols miscellany examples other misc simple duplicates""".split()
)

# Words of file names and titles that stand for nothing in the picture.
TITLE_JUNK = frozenset(
    """svg png clipart openclipart gnome fs stock kde kcm kcmdf crystal remix md inkscape aiga
    ganson various cliparts version ver email final illustration v outline-only untitled
    collection submission sibmission r bis rollandin francesco architetto by from simbol""".split()
)

# Joined or shortened words, as file names have them.
RESPELL = {
    "bw": "black and white", "bn": "black and white", "bg": "background", "fileopen": "open file",
    "filenew": "new file", "filesave": "save file", "fileclose": "close file",
    "fileprint": "print file", "fileimport": "import file", "fileexport": "export file",
    "filefind": "find file", "filequickprint": "quick print file", "editcut": "cut",
    "editcopy": "copy", "editpaste": "paste", "editdelete": "delete", "editclear": "clear",
    "pict": "pictogram", "icecream": "ice cream", "glace": "ice cream", "mans": "man",
    "fc": "flow chart", "baloon": "balloon", "simbol": "symbol", "cd": "compact disc",
    "hz": "horizontal", "vt": "vertical", "tickey": "ticket", "vegitable": "vegetable",
    "rpg": "role playing game", "app": "application", "apps": "applications",
    "sallite": "satellite", "led": "led light", "pfd": "life jacket",
    "vgcats": "cats", "sm": "stick man", "nuage": "cloud", "porcinet": "piglet",
}  # fmt: skip

# Parts into which a joined word of an icon's file name is cut, when parts cover it wholly.
ICON_PARTS = frozenset(
    """file folder edit view player mail text new open save close print import export add remove
    delete left right up down back forward next previous top bottom center table row column
    insert adjust image sound video window list tree arrow zoom format line frame find replace
    undo redo copy cut paste stop start play pause record eject go home bookmark book mark lock
    unlock user group password key chat send receive reply attach spell check color font bold
    italic under strike web page document source make config run build debug help about exit
    one two three goto history reload refresh rotate flip crop layer select all none math sum
    cell merge split sort filter calendar day week month year today note music disk cd dvd
    network server printer scanner camera mouse keyboard monitor display screen saver
    desktop background date time clock battery power news package game misc tool tools
    kick""".split()
)

# Italian, French and Spanish words of titles. Several authors titled their drawings so.
GLOSSARY = {
    "abeille": "bee", "abitazione": "house", "acciaio": "steel", "acquila": "eagle",
    "aerestatico": "hot air", "aglio": "garlic", "aladino": "aladdin", "albero": "tree",
    "altum": "", "amibe": "amoeba", "anelli": "rings", "antilope": "antelope",
    "appunti": "notes", "aquila": "eagle", "arancione": "orange", "arrotolata": "curled",
    "asso": "ace", "attenzione": "caution", "ballerina": "ballerina", "bambina": "girl",
    "barattolo": "jar", "bianchi": "white", "bianco": "white", "bianca": "white",
    "bicicletta": "bicycle", "binocolo": "binoculars", "birra": "beer", "bobi": "dog",
    "borsa": "bag", "bottiglia": "bottle", "brindisi": "toast", "bussiness": "business",
    "bussola": "compass", "cacciavite": "screwdriver", "caffe": "coffee",
    "calamita": "magnet", "calcolatrice": "calculator", "calici": "glasses",
    "camicia": "shirt", "campagna": "country", "campeggio": "camping", "canguro": "kangaroo",
    "cani": "dogs", "capitello": "capital of a column", "carriera": "career", "carta": "paper",
    "carte": "card", "cartella": "folder", "casa": "house", "casco": "helmet",
    "cassa": "cash box", "cassette": "cassettes", "cavalletta": "grasshopper",
    "cavallo": "horse", "cestino": "basket", "cesto": "basket", "chiave": "key",
    "chimico": "chemical", "cigni": "swans", "cigno": "swan", "cinepresa": "film camera",
    "civetta": "owl", "clessidra": "hourglass", "coccinella": "ladybug",
    "coccinelle": "ladybug", "coccinellona": "big ladybug", "collant": "tights", "col": "with",
    "coltello": "knife", "comune": "municipal", "con": "with", "coniglio": "rabbit",
    "contorno": "outline", "costruzione": "construction", "cretina": "silly", "cubo": "cube",
    "cucina": "kitchen", "cymru": "wales", "da": "for", "decorazione": "decoration",
    "dei": "of", "del": "of", "dell": "of", "demolizione": "demolition", "dente": "tooth",
    "di": "of", "diagramma": "diagram", "digitale": "digital", "dino": "dinosaur",
    "dinosauri": "dinosaurs", "dinosauro": "dinosaur", "disco": "disk", "donna": "woman",
    "dottore": "doctor", "due": "two", "e": "and", "egizio": "egyptian", "elefante": "elephant",
    "emergenza": "emergency", "epoca": "antique", "esperimento": "experiment",
    "estendi": "extend", "estiva": "summer", "et": "and", "etoile": "star", "fabbrica": "factory",
    "farfalla": "butterfly", "farfalle": "butterflies", "fata": "fairy", "fatina": "little fairy",
    "ferro": "iron", "figo": "cool", "finestra": "window", "finestre": "windows",
    "fiori": "flowers", "fiore": "flower", "flamand": "flemish", "fleur": "flower",
    "foglio": "sheet", "forbici": "scissors", "forchettoni": "forks", "formichina": "little ant",
    "formicona": "big ant", "formulario": "form", "fotografica": "photo", "frontale": "front",
    "frullatore": "blender", "fuoco": "fire", "gabbiano": "seagull", "gallina": "hen",
    "gallo": "rooster", "gatti": "cats", "gattina": "kitten", "gatto": "cat",
    "gelato": "ice cream", "general": "general", "geometrico": "geometric",
    "ghiaccio": "ice", "gialla": "yellow", "giallo": "yellow", "giapponese": "japanese",
    "giardino": "garden", "gran": "big", "griglia": "grill", "grigio": "grey",
    "grigia": "grey", "grigliata": "barbecue", "gufo": "owl", "homme": "man", "incazzato": "angry",
    "incinta": "pregnant", "insetto": "insect", "insieme": "together", "io": "", "istogramma":
    "histogram", "italiana": "italian", "lampada": "lamp", "lana": "wool", "lattine": "cans",
    "legno": "wood", "lente": "lens", "leone": "lion", "lettera": "letter",
    "libellula": "dragonfly", "libellule": "dragonfly", "libro": "book", "liquido": "liquid",
    "livella": "spirit level", "lucchetto": "padlock", "lucertola": "lizard",
    "lucertolona": "big lizard", "lucertolone": "big lizard", "lumaca": "snail", "macchina":
    "machine", "maison": "house", "mante": "mantis", "mantide": "mantis", "marchio": "brand",
    "marino": "sea", "mattone": "brick", "mazzo": "bunch", "medicina": "medicine", "mela": "apple",
    "meno": "minus", "microfono": "microphone", "microscopio": "microscope", "mobile": "furniture",
    "mie": "my", "modanatura": "moulding", "modanature": "", "mondo": "world",
    "montagna": "mountain", "moschito": "mosquito", "mostriciattolo": "little monster",
    "motivo": "pattern", "moulure": "", "moulures": "", "nel": "in", "nella": "in",
    "neri": "black", "nero": "black", "neve": "snow", "noi": "us", "nonno": "grandfather",
    "normale": "normal", "notte": "night", "nucleare": "nuclear", "nuvola": "cloud",
    "oiseau": "bird", "ombrelloni": "umbrellas", "orme": "footprints", "orologio": "clock",
    "orso": "bear", "ottone": "brass", "ours": "bear", "pacco": "parcel", "pace": "peace",
    "paesaggio": "landscape", "palloncini": "balloons", "pallone": "balloon", "palude": "swamp",
    "pannocchia": "ear of corn", "papillon": "butterfly", "parete": "wall",
    "pattinatrice": "skater", "pattinatrici": "skaters", "pattino": "skate", "pecora": "sheep",
    "pentola": "pot", "peperoncino": "chili", "per": "for", "pera": "pear", "pesca": "peach",
    "pescetto": "little fish", "pesce": "fish", "pettine": "comb", "pezzata": "spotted",
    "piccolo": "young", "pieno": "full", "pillole": "pills", "pinguino": "penguin",
    "pinzatrice": "stapler", "plurifamigliare": "apartment", "poisson": "fish", "pollo": "chicken",
    "poltrona": "armchair", "pomme": "apple", "pomodori": "tomatoes", "portafoglio": "wallet",
    "posate": "cutlery", "pregiato": "fine", "preferite": "favourite", "profilati": "profiles",
    "profilato": "profile", "profilo": "profile", "proiettore": "projector",
    "provetta": "test tube", "provette": "test tubes", "prugna": "plum", "pulsante": "button",
    "punaisa": "bug", "puntine": "thumbtacks", "quattro": "four", "ragnetto": "little spider",
    "ragno": "spider", "ramarro": "green lizard", "rana": "frog", "ravanello": "radish",
    "regalo": "gift", "religieuse": "praying", "religiosa": "praying", "ricette": "recipes",
    "ridimensiona": "resize", "rigido": "hard", "rilievo": "relief", "rossa": "red",
    "rosso": "red", "rotondo": "round", "ruota": "wheel", "sacco": "sack", "salvagente": "lifebuoy",
    "sangue": "blood", "sanitaria": "medical", "sapone": "soap", "schermo": "screen",
    "scodella": "bowl", "scolapasta": "colander", "secchio": "bucket", "sedia": "chair",
    "seduto": "sitting", "sega": "saw", "semplice": "simple", "seta": "silk", "signore": "man",
    "signorina": "young lady", "simbolo": "symbol", "singolo": "single", "siringa": "syringe",
    "soleil": "sun", "sogni": "dreams", "sovrapposte": "overlapping", "spalle": "behind",
    "spugna": "sponge", "stagioni": "seasons", "stambecco": "ibex", "stampante": "printer",
    "stecchito": "dead", "stemma": "coat of arms", "stilizzata": "stylized", "stormo": "flock",
    "sub": "diver", "subacqueo": "underwater", "sul": "on", "sulla": "on", "tabella": "table",
    "tacchino": "turkey", "tante": "many", "tasto": "key", "tatoo": "tattoo", "tatuaggi": "",
    "tatuaggio": "", "tavolo": "table", "tavolozza": "palette", "tazza": "cup",
    "teiera": "teapot", "telecamera": "video camera", "telecomando": "remote control",
    "telefono": "telephone", "televisore": "television", "tenda": "tent", "tigre": "tiger",
    "tigri": "tigers", "topo": "mouse", "toro": "bull", "torta": "cake", "tramonto": "sunset",
    "trattore": "tractor", "turco": "turkish", "uccelli": "birds", "uccello": "bird",
    "umano": "human", "umain": "", "humain": "", "uomo": "man", "utensile": "tool",
    "utensili": "tools", "ufficio": "office", "utente": "user", "utenti": "users",
    "vacca": "cow", "valdostana": "", "valdostano": "", "valigie": "suitcases",
    "verde": "green", "verre": "glass", "vetro": "glass", "video": "video", "vino": "wine",
    "viti": "screws", "vuoto": "empty", "zanzara": "mosquito", "zucca": "pumpkin",
    "unita": "drive", "bibliografia": "bibliography", "ontologia": "ontology", "dentata": "gear",
    "ruote": "wheels", "diario": "diary", "arbre": "tree", "chat": "cat", "chien": "dog",
    "cheval": "horse", "danger": "danger", "feu": "fire", "lune": "moon", "voiture": "car",
    "le": "", "la": "", "il": "", "gli": "", "una": "", "les": "", "des": "of", "du": "of",
    "italia": "italy", "francia": "france", "coupe": "cup", "fraise": "strawberry",
    "cerise": "cherry", "poire": "pear", "raisin": "grape", "gateau": "cake", "fromage": "cheese",
    "fondue": "fondue", "citron": "lemon", "banane": "banana", "sucre": "sugar", "lait": "milk",
}  # fmt: skip

RANKS = {
    "a": "ace", "k": "king", "q": "queen", "j": "jack", "2": "two", "3": "three", "4": "four",
    "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine", "10": "ten",
}  # fmt: skip
SUITS = {"h": "hearts", "c": "clubs", "s": "spades", "d": "diamonds"}

# Categories whose subject a bare name leaves open ("zimbabwe"), and the words that say it.
SUBJECTS = {
    "signs_and_symbols/flags": "flag",
    "transportation/roadsigns": "road sign",
    "signs_and_symbols/map_symbols": "map symbol",
    "special/gradients": "gradient",
    "special/patterns": "pattern",
    "computer/icons": "icon",
    "people/smilies": "smiley",
    "shapes/stars": "star",
}
