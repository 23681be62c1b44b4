"""The shelf of sources: official annotation files to rows of LLaVA's JSON.

A source is one function from a `Task` to rows, its rules, and one line of the table.
"""

from pumice.core.registry import Registry
from pumice.data.academic.aokvqa import AokvqaRules, aokvqa_rows
from pumice.data.academic.base import Converter
from pumice.data.academic.captions import (
    CaptionRules,
    LcsRules,
    TextCapsRules,
    coco_caption_rows,
    lcs_rows,
    textcaps_rows,
)
from pumice.data.academic.gqa import GqaRules, gqa_rows
from pumice.data.academic.llava_files import LlavaRules, llava_rows
from pumice.data.academic.ocrvqa import OcrVqaRules, ocrvqa_rows
from pumice.data.academic.refcoco import RefcocoRules, refcoco_rows
from pumice.data.academic.scienceqa import ScienceQaRules, scienceqa_rows
from pumice.data.academic.sharegpt import ShareGptRules, sharegpt_rows
from pumice.data.academic.visual_genome import GenomeRules, genome_rows
from pumice.data.academic.vqa import VqaRules, vqa_rows

CONVERTERS: Registry[Converter] = Registry(
    "source",
    {
        "llava-instruct": Converter(
            "LLaVA-Instruct: rows checked, images named as in the mixture",
            "llava_instruct_150k.json",
            LlavaRules,
            llava_rows,
        ),
        "sharegpt": Converter(
            "ShareGPT dialogues, cleaned and cut", "sg_90k_part1.json", ShareGptRules, sharegpt_rows
        ),
        "vqav2": Converter(
            "VQAv2: the answer of most annotators",
            "v2_OpenEnded_mscoco_train2014_questions.json v2_mscoco_train2014_annotations.json",
            VqaRules,
            vqa_rows,
        ),
        "gqa": Converter("GQA", "train_balanced_questions.json", GqaRules, gqa_rows),
        "okvqa": Converter(
            "OK-VQA: the answer of most annotators",
            "OpenEnded_mscoco_train2014_questions.json mscoco_train2014_annotations.json",
            VqaRules,
            vqa_rows,
        ),
        "ocrvqa": Converter("OCR-VQA", "dataset.json", OcrVqaRules, ocrvqa_rows),
        "aokvqa": Converter(
            "A-OKVQA: letters, choices rotated", "aokvqa_v1p0_train.json", AokvqaRules, aokvqa_rows
        ),
        "textcaps": Converter(
            "TextCaps with OCR tokens",
            "TextCaps_0.1_train.json TextVQA_Rosetta_OCR_v0.2_train.json",
            TextCapsRules,
            textcaps_rows,
        ),
        "refcoco": Converter(
            "RefCOCO, RefCOCO+, RefCOCOg: boxes and phrases",
            "refs(unc).p instances.json",
            RefcocoRules,
            refcoco_rows,
        ),
        "vg": Converter(
            "Visual Genome: boxes and phrases",
            "region_descriptions.json image_data.json",
            GenomeRules,
            genome_rows,
        ),
        "scienceqa": Converter(
            "ScienceQA", "problems.json pid_splits.json", ScienceQaRules, scienceqa_rows
        ),
        "coco-captions": Converter(
            "COCO captions", "captions_train2017.json", CaptionRules, coco_caption_rows
        ),
        "lcs558k": Converter(
            "LCS-558K, as published or from its table of captions",
            "blip_laion_cc_sbu_558k.json or blip_laion_cc_sbu_558k_meta.json",
            LcsRules,
            lcs_rows,
        ),
    },
)
