"""How learned networks come about; the only package that imports pytorch_lightning."""

from shields.registry import Registry

__all__ = ["TRAINERS"]

#: name -> LightningModule; `shields train NAME fit|validate|export`
TRAINERS: Registry[type] = Registry(
    "trainer",
    {
        "portrait-ae": "trainers.portrait_ae:PortraitAutoencoderTraining",
        "face-embedder": "trainers.face_embedder:FaceEmbedderTraining",
        "expression-classifier": "trainers.attribute_classifier:AttributeClassifierTraining",
        "ars": "trainers.ars:ArsTraining",
        "idguard": "trainers.idguard:IdGuardTraining",
        "tafim": "trainers.tafim:TafimTraining",
        "pg": "trainers.pg:PgTraining",
        "iap-like": "trainers.iap:IapTraining",
        "cmua": "trainers.cmua:CmuaTraining",
        "forensics": "trainers.forensics:ForensicsTraining",
        "manipulator": "trainers.manipulator:ManipulatorTraining",
        "robust-manipulator": "trainers.robust_manipulator:RobustManipulatorTraining",
        "restorer": "trainers.restorer:RestorerTraining",
        "purifier": "trainers.purifier:PurifierTraining",
    },
)
