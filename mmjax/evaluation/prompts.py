"""Prompts as data: templates by modality and language, and words for the classes of the embedded
data sets by language.

A modality or language that is missing here uses the bare name ("{}"); a class that is missing uses
its label in words.
"""

from __future__ import annotations

import re

# Of pictures.
TEMPLATES: dict[str, tuple[str, ...]] = {
  "en": ("{}", "a picture of {}", "an emoji of {}", "an icon that shows {}"),
  "zh": ("{}", "{}的图片", "{}表情符号", "一张{}的图"),
  "es": ("{}", "una imagen de {}", "un emoji de {}"),
  "ja": ("{}", "{}の絵", "{}の絵文字"),
  "ko": ("{}", "{} 그림", "{} 이모티콘"),
  "pt": ("{}", "uma imagem de {}", "um emoji de {}"),
  "it": ("{}", "un'immagine di {}", "un'emoji di {}"),
  "fr": ("{}", "une image de {}", "un émoji de {}"),
  "de": ("{}", "ein Bild von {}", "ein Emoji von {}"),
  "fa": ("{}", "تصویر {}", "ایموجی {}"),
  "id": ("{}", "gambar {}", "emoji {}"),
  "ru": ("{}", "изображение: {}", "эмодзи: {}"),
  "tr": ("{}", "{} resmi", "{} emojisi"),
  "ar": ("{}", "صورة {}", "رمز تعبيري {}"),
}

# Of other media, {modality: {language: templates}}.
MEDIA_TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
  "audio": {
    "en": ("{}", "a sound of {}", "the sound of {}", "this is a sound of {}"),
    "zh": ("{}", "{}的声音"),
    "es": ("{}", "el sonido de {}"),
    "fr": ("{}", "le son de {}"),
    "de": ("{}", "ein Geräusch von {}"),
  },
  "video": {
    "en": ("{}", "a video of {}", "a clip of {}"),
    "zh": ("{}", "{}的视频"),
    "es": ("{}", "un vídeo de {}"),
    "fr": ("{}", "une vidéo de {}"),
    "de": ("{}", "ein Video von {}"),
  },
}

# The groups of the Unicode emoji list: words that stand for each, most telling first.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
  "en": {
    "smileys emotion": ("face", "smiling face", "sad face", "cat face", "heart", "feeling"),
    "people body": (
      "person",
      "woman",
      "man",
      "hand",
      "person with skin tone",
      "woman worker",
      "family",
      "body",
    ),
    "component": ("hair", "skin tone"),
    "animals nature": ("animal", "bird", "fish", "insect", "flower", "plant", "tree", "nature"),
    "food drink": ("food", "drink", "fruit", "vegetable", "meal", "cake"),
    "travel places": ("place", "building", "vehicle", "car", "train", "clock", "moon", "weather"),
    "activities": ("activity", "sport", "ball", "game", "medal", "party"),
    "objects": ("object", "tool", "clothing", "book", "phone", "musical instrument", "mail"),
    "symbols": ("symbol", "sign", "button", "arrow", "circle", "square", "zodiac"),
    "flags": ("flag", "flag of a country"),
  },
  "zh": {
    "smileys emotion": ("脸", "笑脸", "心", "情绪"),
    "people body": ("人", "女人", "男人", "手"),
    "component": ("头发", "肤色"),
    "animals nature": ("动物", "鸟", "植物", "花"),
    "food drink": ("食物", "饮料", "水果"),
    "travel places": ("地点", "建筑", "车", "天气"),
    "activities": ("活动", "运动", "球", "游戏"),
    "objects": ("物品", "工具", "衣服", "书"),
    "symbols": ("符号", "标志", "按钮", "箭头"),
    "flags": ("旗", "国旗"),
  },
  "es": {
    "smileys emotion": ("cara", "cara sonriente", "corazón"),
    "people body": ("persona", "mujer", "hombre", "mano"),
    "component": ("pelo", "tono de piel"),
    "animals nature": ("animal", "pájaro", "planta", "flor"),
    "food drink": ("comida", "bebida", "fruta"),
    "travel places": ("lugar", "edificio", "vehículo", "tiempo"),
    "activities": ("actividad", "deporte", "pelota", "juego"),
    "objects": ("objeto", "herramienta", "ropa", "libro"),
    "symbols": ("símbolo", "señal", "botón", "flecha"),
    "flags": ("bandera",),
  },
  "ja": {
    "smileys emotion": ("顔", "笑顔", "ハート"),
    "people body": ("人", "女性", "男性", "手"),
    "component": ("髪", "肌色"),
    "animals nature": ("動物", "鳥", "植物", "花"),
    "food drink": ("食べ物", "飲み物", "果物"),
    "travel places": ("場所", "建物", "乗り物", "天気"),
    "activities": ("活動", "スポーツ", "ボール", "ゲーム"),
    "objects": ("物", "道具", "服", "本"),
    "symbols": ("記号", "マーク", "ボタン", "矢印"),
    "flags": ("旗", "国旗"),
  },
  "ko": {
    "smileys emotion": ("얼굴", "웃는 얼굴", "하트"),
    "people body": ("사람", "여자", "남자", "손"),
    "component": ("머리카락", "피부"),
    "animals nature": ("동물", "새", "식물", "꽃"),
    "food drink": ("음식", "음료", "과일"),
    "travel places": ("장소", "건물", "자동차", "날씨"),
    "activities": ("활동", "스포츠", "공", "게임"),
    "objects": ("물건", "도구", "옷", "책"),
    "symbols": ("기호", "표지판", "버튼", "화살표"),
    "flags": ("깃발", "국기"),
  },
  "pt": {
    "smileys emotion": ("rosto", "rosto sorridente", "coração"),
    "people body": ("pessoa", "mulher", "homem", "mão"),
    "component": ("cabelo", "pele"),
    "animals nature": ("animal", "pássaro", "planta", "flor"),
    "food drink": ("comida", "bebida", "fruta"),
    "travel places": ("lugar", "edifício", "veículo", "tempo"),
    "activities": ("atividade", "esporte", "bola", "jogo"),
    "objects": ("objeto", "ferramenta", "roupa", "livro"),
    "symbols": ("símbolo", "sinal", "botão", "seta"),
    "flags": ("bandeira",),
  },
  "it": {
    "smileys emotion": ("faccina", "faccina che sorride", "cuore"),
    "people body": ("persona", "donna", "uomo", "mano"),
    "component": ("capelli", "carnagione"),
    "animals nature": ("animale", "uccello", "pianta", "fiore"),
    "food drink": ("cibo", "bevanda", "frutta"),
    "travel places": ("luogo", "edificio", "veicolo", "tempo"),
    "activities": ("attività", "sport", "palla", "gioco"),
    "objects": ("oggetto", "attrezzo", "vestito", "libro"),
    "symbols": ("simbolo", "segnale", "pulsante", "freccia"),
    "flags": ("bandiera",),
  },
  "fr": {
    "smileys emotion": ("visage", "visage souriant", "cœur"),
    "people body": ("personne", "femme", "homme", "main"),
    "component": ("cheveux", "peau"),
    "animals nature": ("animal", "oiseau", "plante", "fleur"),
    "food drink": ("nourriture", "boisson", "fruit"),
    "travel places": ("lieu", "bâtiment", "véhicule", "météo"),
    "activities": ("activité", "sport", "ballon", "jeu"),
    "objects": ("objet", "outil", "vêtement", "livre"),
    "symbols": ("symbole", "panneau", "bouton", "flèche"),
    "flags": ("drapeau",),
  },
  "de": {
    "smileys emotion": ("Gesicht", "lächelndes Gesicht", "Herz"),
    "people body": ("Person", "Frau", "Mann", "Hand"),
    "component": ("Haar", "Hautfarbe"),
    "animals nature": ("Tier", "Vogel", "Pflanze", "Blume"),
    "food drink": ("Essen", "Getränk", "Frucht"),
    "travel places": ("Ort", "Gebäude", "Fahrzeug", "Wetter"),
    "activities": ("Aktivität", "Sport", "Ball", "Spiel"),
    "objects": ("Gegenstand", "Werkzeug", "Kleidung", "Buch"),
    "symbols": ("Symbol", "Zeichen", "Schaltfläche", "Pfeil"),
    "flags": ("Flagge",),
  },
  "fa": {
    "smileys emotion": ("صورت", "لبخند", "قلب"),
    "people body": ("فرد", "زن", "مرد", "دست"),
    "component": ("مو", "پوست"),
    "animals nature": ("حیوان", "پرنده", "گیاه", "گل"),
    "food drink": ("غذا", "نوشیدنی", "میوه"),
    "travel places": ("مکان", "ساختمان", "خودرو", "هوا"),
    "activities": ("فعالیت", "ورزش", "توپ", "بازی"),
    "objects": ("شیء", "ابزار", "لباس", "کتاب"),
    "symbols": ("نماد", "علامت", "دکمه", "پیکان"),
    "flags": ("پرچم",),
  },
  "id": {
    "smileys emotion": ("wajah", "wajah tersenyum", "hati"),
    "people body": ("orang", "wanita", "pria", "tangan"),
    "component": ("rambut", "kulit"),
    "animals nature": ("hewan", "burung", "tanaman", "bunga"),
    "food drink": ("makanan", "minuman", "buah"),
    "travel places": ("tempat", "bangunan", "kendaraan", "cuaca"),
    "activities": ("aktivitas", "olahraga", "bola", "permainan"),
    "objects": ("benda", "alat", "pakaian", "buku"),
    "symbols": ("simbol", "tanda", "tombol", "panah"),
    "flags": ("bendera",),
  },
  "ru": {
    "smileys emotion": ("лицо", "улыбающееся лицо", "сердце"),
    "people body": ("человек", "женщина", "мужчина", "рука"),
    "component": ("волосы", "кожа"),
    "animals nature": ("животное", "птица", "растение", "цветок"),
    "food drink": ("еда", "напиток", "фрукт"),
    "travel places": ("место", "здание", "транспорт", "погода"),
    "activities": ("занятие", "спорт", "мяч", "игра"),
    "objects": ("предмет", "инструмент", "одежда", "книга"),
    "symbols": ("символ", "знак", "кнопка", "стрелка"),
    "flags": ("флаг",),
  },
  "tr": {
    "smileys emotion": ("yüz", "gülümseyen yüz", "kalp"),
    "people body": ("kişi", "kadın", "erkek", "el"),
    "component": ("saç", "ten"),
    "animals nature": ("hayvan", "kuş", "bitki", "çiçek"),
    "food drink": ("yiyecek", "içecek", "meyve"),
    "travel places": ("yer", "bina", "araç", "hava"),
    "activities": ("etkinlik", "spor", "top", "oyun"),
    "objects": ("nesne", "alet", "giysi", "kitap"),
    "symbols": ("sembol", "işaret", "düğme", "ok"),
    "flags": ("bayrak",),
  },
  "ar": {
    "smileys emotion": ("وجه", "وجه مبتسم", "قلب"),
    "people body": ("شخص", "امرأة", "رجل", "يد"),
    "component": ("شعر", "بشرة"),
    "animals nature": ("حيوان", "طائر", "نبات", "زهرة"),
    "food drink": ("طعام", "شراب", "فاكهة"),
    "travel places": ("مكان", "مبنى", "مركبة", "طقس"),
    "activities": ("نشاط", "رياضة", "كرة", "لعبة"),
    "objects": ("شيء", "أداة", "ملابس", "كتاب"),
    "symbols": ("رمز", "علامة", "زر", "سهم"),
    "flags": ("علم",),
  },
}


def words(label: str) -> str:
  """A label in plain words: "Animals & Nature", "animals-nature" and "animals_and_nature" all give
  "animals nature".
  """
  return " ".join(w for w in re.split(r"[\W_]+", label.lower()) if w and w != "and")


def templates(language: str, modality: str = "image") -> tuple[str, ...]:
  """The prompts of a language for what is classified, each with {} for the name of the class."""
  known = TEMPLATES if modality == "image" else MEDIA_TEMPLATES.get(modality, {})
  return known.get(language, ("{}",))


def names(label: str, language: str) -> tuple[str, ...]:
  """The words that stand for a class in a language: from NAMES, else the label's own."""
  return NAMES.get(language, {}).get(words(label)) or (words(label) or label,)
