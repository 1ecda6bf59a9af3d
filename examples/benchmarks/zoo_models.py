"""The architectures that zoo.py takes from timm, transformers, ultralytics and Keras.

torchvision's are all taken. Of timm's 1,500 names, which are mostly one architecture at several
widths, depths and input sizes, each family (a module of timm's) has a small member of every kind
in it.
"""

from __future__ import annotations

TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "botnet26t_256 halonet26t lambda_resnet26t eca_botnext26ts_256",
    "byobnet": "repvgg_a0 repvgg_b1g4 repvgg_d2se mobileone_s0 mobileone_s4 gernet_s resnet32ts "
    "resnext26ts resnet51q seresnext26ts eca_resnext26ts gcresnext26ts bat_resnext26ts regnetz_b16 "
    "resnet50_clip resnet50_clip_gap resnet50_mlp test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto convnext_atto_ols convnext_atto_rms convnext_tiny_hnf "
    "convnext_zepto_rms convnextv2_atto test_convnext test_convnext2 test_convnext3",
    "cpubone": "cpubone_nano cpubone_b1_dwnorm",
    "crossvit": "crossvit_9_240",
    "csatv2": "csatv2",
    "cspnet": "cspresnet50 cspresnext50 cspdarknet53 darknet17 darknet53 darknetaa53 sedarknet21 "
    "cs3darknet_s cs3darknet_focus_s cs3edgenet_x cs3sedarknet_l",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224",
    "densenet": "densenet121 densenetblur121d",
    "dla": "dla34 dla46_c dla46x_c dla60_res2net",
    "dpn": "dpn48b dpn68 dpn68b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "efficientnet_b0 efficientnet_lite0 tf_efficientnet_lite0 efficientnet_es "
    "efficientnet_b0_gn efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnetv2_rw_t "
    "gc_efficientnetv2_rw_t tf_efficientnetv2_b0 fbnetc_100 mixnet_s tf_mixnet_s mnasnet_050 "
    "mnasnet_small semnasnet_050 spnasnet_100 mobilenet_edgetpu_100 mobilenet_edgetpu_v2_xs "
    "mobilenetv1_100 mobilenetv2_050 mobilenetv2_110d tinynet_e test_efficientnet "
    "test_efficientnet_ln test_efficientnet_evos",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224 vit_small_patch16_dinov3",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8 fastvit_sa12 fastvit_mci0",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnet_tiny hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s levit_conv_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto test_mambaout",
    "maxxvit": "coatnet_nano_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 "
    "maxxvit_rmlp_nano_rw_256",
    "metaformer": "poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18",
    "mlp_mixer": "mixer_s32_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050 mobilenetv3_large_075 tf_mobilenetv3_small_minimal_100 "
    "fbnetv3_b lcnet_035 mobilenetv4_conv_small_035 mobilenetv4_conv_aa_medium "
    "mobilenetv4_conv_blur_medium mobilenetv4_hybrid_medium_075",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nfnet_l0 eca_nfnet_l0 dm_nfnet_f0 nf_regnet_b0 nf_resnet26 nf_ecaresnet26 "
    "nf_seresnet26 test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002 regnetv_040 regnetz_005",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2net50_14w_8s res2net50d res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t resnet18 resnet18d resnet26 resnet26t resnet50c resnet50s resnetaa34d "
    "resnetblur18 resnext50_32x4d wide_resnet50_2 resnet50_gn ecaresnet26t ecaresnetlight "
    "seresnet18 seresnext26t_32x4d resnetrs50 senet154 test_resnet",
    "resnetv2": "resnetv2_18 resnetv2_18d resnetv2_50t resnetv2_50x1_bit resnetv2_50d_evos "
    "resnetv2_50d_frn resnetv2_50d_gn",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42 selecsls60b",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m tresnet_v2_l",
    "twins": "twins_svt_small twins_pcpvt_small",
    "vgg": "vgg11 vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224 vit_base_patch32_clip_224 test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224 vit_small_resnet26d_224",
    "vision_transformer_relpos": "vit_relpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "vovnet39a ese_vovnet19b_slim eca_vovnet39b",
    "xception": "xception legacy_xception",
    "xception_aligned": "xception41 xception41p",
    "xcit": "xcit_nano_12_p16_224",
}
"""From a module of timm's to the names of the models taken from it."""

TRANSFORMERS_CHANGES: dict[str, dict[str, object]] = {
    "convnext": {"hidden_sizes": [24, 48, 96, 192], "depths": [2, 2, 3, 2]},
    "convnextv2": {"hidden_sizes": [24, 48, 96, 192], "depths": [2, 2, 3, 2]},
    "timm_wrapper": {"architecture": "resnet18"},
}
"""From a model type of transformers to what is changed in its default configuration."""

TRANSFORMERS_LEFT_OUT = {
    "dinat": "needs the package natten",
    "imagegpt": "takes the colour clusters of pixels as tokens",
    "shieldgemma2": "takes text and an image",
    "siglip2": "takes patches, not images",
}
"""Model types that are no classifiers of images ``(N, C, H, W)``, or cannot be built here."""

ULTRALYTICS = {
    "v8": "yolov8n-cls yolov8s-cls yolov8m-cls yolov8l-cls yolov8x-cls yolov8-cls-resnet50",
    "11": "yolo11n-cls yolo11s-cls yolo11m-cls",
}
"""From a version of ultralytics' classifiers to their names."""

KERAS = {
    "mobilenet": "MobileNet",
    "mobilenet_v2": "MobileNetV2",
    "efficientnet": "EfficientNetB0",
    "resnet": "ResNet50",
    "densenet": "DenseNet121",
    "vgg": "VGG16",
    "xception": "Xception",
    "inception_v3": "InceptionV3",
    "mobilenet_v3": "MobileNetV3Small",
    "resnet_v2": "ResNet50V2",
    "convnext": "ConvNeXtTiny",
    "inception_resnet_v2": "InceptionResNetV2",
    "efficientnet_v2": "EfficientNetV2B0",
    "nasnet": "NASNetMobile",
}
"""From a module of keras.applications to the names of the models taken from it."""

ONNX_LEFT_OUT = ("vgg19", "zfnet512")
"""Light models whose fully connected layers take longer in float64 than a model may."""
