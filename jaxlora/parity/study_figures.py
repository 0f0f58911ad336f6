"""Figures of the seed study, from its own artifacts: the second reference besides a live service.

The study: Qwen/Qwen3-8B trained on Tinker, two conditions, seeds 0, 1, 2; see `configs/main.py`.
"""

from __future__ import annotations

CONDITIONS = ("attention_only", "all_layer")
SEEDS = (0, 1, 2)
ADAPTERS = "hf://sumitdotml/lora-and-friends/checkpoints/best-checkpoints"
SELECTED_STEP = 3169  # of all six runs

TRAIN_TOKENS = 17_227_430  # per run: two epochs, shifted counts
VALIDATION_TOKENS = 6_556_081  # per run: seven passes
PARAMETERS = {"attention_only": 7_667_712, "all_layer": 21_823_488}
ADAPTER_BYTES = {"attention_only": 30_709_160, "all_layer": 87_360_552}

VALIDATION_STEPS = (1000, 2000, 3169, 4000, 5000, 6000, 6338)
VALIDATION_NLL = {  # condition -> seed -> mean NLL at VALIDATION_STEPS
    "attention_only": {
        0: (
            0.3468661579136847, 0.3410821743602446, 0.33616363178874076, 0.3391218371592512,
            0.33782604786344844, 0.3374170395478927, 0.3364468510604867,
        ),
        1: (
            0.3467035731733388, 0.3410341652366035, 0.33621202263413363, 0.3387062138585547,
            0.3379754202999871, 0.33756054030574645, 0.33667646609757407,
        ),
        2: (
            0.34653612333243416, 0.34149399717505874, 0.33651007850933906, 0.3383288403931016,
            0.33744255415305063, 0.33728229576529856, 0.3366583420042444,
        ),
    },
    "all_layer": {
        0: (
            0.3459276755590434, 0.342182684437154, 0.33611938013674597, 0.3456637918063231,
            0.34656007143092127, 0.34717140110659017, 0.3454597575300345,
        ),
        1: (
            0.34568629786299837, 0.3417758140564665, 0.33655583715915666, 0.34549824556309505,
            0.34660669579029896, 0.34675305253441124, 0.3448380973199015,
        ),
        2: (
            0.34609265838650455, 0.3419021125773252, 0.33634131648081267, 0.3461580484910246,
            0.34558767552526903, 0.3468111376563113, 0.34655864845661416,
        ),
    },
}  # fmt: skip

# GSM8K test, 1,319 problems: correct answers by the strict score, answers without a box.
PROBLEMS = 1319
PROMPT_TOKENS = 132_306
BASE_CORRECT, BASE_NO_BOX, BASE_GENERATED_TOKENS = 1115, 31, 373_388
CORRECT = {"attention_only": {0: 1193, 1: 1196, 2: 1194}, "all_layer": {0: 1186, 1: 1190, 2: 1189}}
NO_BOX = {"attention_only": {0: 6, 1: 2, 2: 5}, "all_layer": {0: 5, 1: 4, 2: 8}}

# The first steps on the first rows of the training file, at the constant rate 3e-4 (attention_only, seed 7).
FIRST_STEP_TOKENS = (2461, 2433, 3295, 2013, 2012, 2162, 2826, 3896)
FIRST_STEP_LOSSES = (
    1.1410128224003422, 0.9159870085898116, 0.8141170775727608, 0.5828900654337219,
    0.5233039313454512, 0.43047901566835467, 0.4490786428801624, 0.4689470645907807,
)  # fmt: skip
SELECTION_ROWS, SELECTION_SEED = 512, 7
SELECTION_NLL = {  # learning-rate selection: condition -> rate -> validation NLL after 64 steps
    "attention_only": {1e-4: 0.3786645046540731, 3e-4: 0.3632619345728878, 1e-3: 0.3644437038722405},
    "all_layer": {1e-4: 0.3648794147648033, 3e-4: 0.3559855057286731, 1e-3: 0.37397296784836664},
}
