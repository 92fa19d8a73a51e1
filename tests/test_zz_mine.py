from shields.models.detectors import MtcnnDetector
from shields.protectors import PROTECTORS
from tests import tiny
for _n, _a in {"df-rap": "shields.protectors.dfrap:DfRap", "faceshield": "shields.protectors.faceshield:FaceShield"}.items():
    if _n not in PROTECTORS:
        PROTECTORS.add(_n, _a)
for _n in [*PROTECTORS]:
    if _n not in ("df-rap", "faceshield"):
        PROTECTORS.remove(_n)
if not hasattr(tiny, "detector"):
    tiny.detector = MtcnnDetector
import pathlib
_s = pathlib.Path("tests/contracts/test_protectors.py").read_text().replace("VARIANTS = {", "VARIANTS = {'df-rap': [{'conditions': 'smiling', 'gradient': 'straight', 'balance': 0.5}], 'faceshield': [{'softened': False, 'low_passed': False, 'momentum': 0.9}, {'detector_weight': 0.0, 'keep': 'best'}],", 1)
exec(compile(_s, "x", "exec"))
