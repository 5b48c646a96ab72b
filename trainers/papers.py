"""Papers behind the trainers, in the form that TRL's model card takes."""

import textwrap

# CAT (C-AdvUL) and CAPO (C-AdvIPO)
CONTINUOUS_ATTACKS = {
    "title": "Efficient Adversarial Training in LLMs with Continuous Attacks",
    "id": "2405.15589",
    "citation": textwrap.dedent("""\
        @inproceedings{xhonneux2024efficient,
            title     = {{Efficient Adversarial Training in LLMs with Continuous Attacks}},
            author    = {Sophie Xhonneux and Alessandro Sordoni and Stephan G{\\"u}nnemann and Gauthier Gidel
                         and Leo Schwinn},
            year      = 2024,
            booktitle = {Advances in Neural Information Processing Systems 37 (NeurIPS 2024)},
        }"""),
}

# NoiseFiT
NOISE_AUGMENTED = {
    "title": "Noise Augmented Fine Tuning for Mitigating Hallucinations in Large Language Models",
    "id": "2504.03302",
    "citation": textwrap.dedent("""\
        @article{khadangi2025noise,
            title   = {{Noise Augmented Fine Tuning for Mitigating Hallucinations in Large Language Models}},
            author  = {Afshin Khadangi and Amir Sartipi and Igor Tchappi and Ramin Bahmani},
            year    = 2025,
            journal = {arXiv preprint arXiv:2504.03302},
        }"""),
}

# AdvUnlearn
ADVUNLEARN = {
    "title": "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models",
    "id": "2405.15234",
    "citation": textwrap.dedent("""\
        @inproceedings{zhang2024defensive,
            title     = {{Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models}},
            author    = {Yimeng Zhang and Xin Chen and Jinghan Jia and Yihua Zhang and Chongyu Fan and Jiancheng Liu
                         and Mingyi Hong and Ke Ding and Sijia Liu},
            year      = 2024,
            booktitle = {Advances in Neural Information Processing Systems 37 (NeurIPS 2024)},
        }"""),
}

# Robust fine-tuning of CLIP, by `loss_type`
CLIP_PAPERS = {
    "fare": {
        "title": "Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings for Robust Large Vision-Language "
        "Models",
        "id": "2402.12336",
        "citation": textwrap.dedent("""\
            @inproceedings{schlarmann2024robust,
                title     = {{Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings for Robust Large
                             Vision-Language Models}},
                author    = {Christian Schlarmann and Naman Deep Singh and Francesco Croce and Matthias Hein},
                year      = 2024,
                booktitle = {International Conference on Machine Learning (ICML)},
            }"""),
    },
    "tecoa": {
        "title": "Understanding Zero-Shot Adversarial Robustness for Large-Scale Models",
        "id": "2212.07016",
        "citation": textwrap.dedent("""\
            @inproceedings{mao2023understanding,
                title     = {{Understanding Zero-Shot Adversarial Robustness for Large-Scale Models}},
                author    = {Chengzhi Mao and Scott Geng and Junfeng Yang and Xin Wang and Carl Vondrick},
                year      = 2023,
                booktitle = {International Conference on Learning Representations (ICLR)},
            }"""),
    },
    "pmg_aft": {
        "title": "Pre-trained Model Guided Fine-Tuning for Zero-Shot Adversarial Robustness",
        "id": "2401.04350",
        "citation": textwrap.dedent("""\
            @inproceedings{wang2024pretrained,
                title     = {{Pre-trained Model Guided Fine-Tuning for Zero-Shot Adversarial Robustness}},
                author    = {Sibo Wang and Jie Zhang and Zheng Yuan and Shiguang Shan},
                year      = 2024,
                booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
            }"""),
    },
    "sim_clip": {
        "title": "Sim-CLIP: Unsupervised Siamese Adversarial Fine-Tuning for Robust and Semantically-Rich Vision-Language "
        "Models",
        "id": "2407.14971",
        "citation": textwrap.dedent("""\
            @article{hossain2024simclip,
                title   = {{Sim-CLIP: Unsupervised Siamese Adversarial Fine-Tuning for Robust and Semantically-Rich
                           Vision-Language Models}},
                author  = {Md Zarif Hossain and Ahmed Imteaj},
                year    = 2024,
                journal = {arXiv preprint arXiv:2407.14971},
            }"""),
    },
}

# Adversarial fine-tuning of vision-language models: the inner maximisation is PGD-AT's
PIXEL_ADVERSARIAL_TRAINING = {
    "title": "Towards Deep Learning Models Resistant to Adversarial Attacks",
    "id": "1706.06083",
    "citation": textwrap.dedent("""\
        @inproceedings{madry2018towards,
            title     = {{Towards Deep Learning Models Resistant to Adversarial Attacks}},
            author    = {Aleksander Madry and Aleksandar Makelov and Ludwig Schmidt and Dimitris Tsipras and Adrian Vladu},
            year      = 2018,
            booktitle = {International Conference on Learning Representations (ICLR)},
        }"""),
}

# Robust unlearning of language models, by `robust`
_UNLEARNING_WITH_SAM = {
    "title": "Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization Perspective and Beyond",
    "id": "2502.05374",
    "citation": textwrap.dedent("""\
        @inproceedings{fan2025towards,
            title     = {{Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization Perspective
                         and Beyond}},
            author    = {Chongyu Fan and Jinghan Jia and Yihua Zhang and Anil Ramakrishna and Mingyi Hong and Sijia Liu},
            year      = 2025,
            booktitle = {International Conference on Machine Learning (ICML)},
        }"""),
}
ROBUST_UNLEARNING_PAPERS = {
    "none": (),
    "sam": (
        {
            "title": "Sharpness-Aware Minimization for Efficiently Improving Generalization",
            "id": "2010.01412",
            "citation": textwrap.dedent("""\
                @inproceedings{foret2021sharpness,
                    title     = {{Sharpness-Aware Minimization for Efficiently Improving Generalization}},
                    author    = {Pierre Foret and Ariel Kleiner and Hossein Mobahi and Behnam Neyshabur},
                    year      = 2021,
                    booktitle = {International Conference on Learning Representations (ICLR)},
                }"""),
        },
        _UNLEARNING_WITH_SAM,
    ),
    "smooth": (_UNLEARNING_WITH_SAM,),
    "latent": (
        {
            "title": "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs",
            "id": "2407.15549",
            "citation": textwrap.dedent("""\
                @article{sheshadri2024latent,
                    title   = {{Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs}},
                    author  = {Abhay Sheshadri and Aidan Ewart and Phillip Guo and Aengus Lynch and Cindy Wu and Vivek Hebbar
                               and Henry Sleight and Asa Cooper Stickland and Ethan Perez and Dylan Hadfield-Menell and
                               Stephen Casper},
                    year    = 2024,
                    journal = {arXiv preprint arXiv:2407.15549},
                }"""),
        },
    ),
    "embedding": (CONTINUOUS_ATTACKS,),
}

# Unlearning of language models, by `loss_type`
UNLEARNING_PAPERS = {
    "grad_diff": {
        "title": "Continual Learning and Private Unlearning",
        "id": "2203.12817",
        "citation": textwrap.dedent("""\
            @inproceedings{liu2022continual,
                title     = {{Continual Learning and Private Unlearning}},
                author    = {Bo Liu and Qiang Liu and Peter Stone},
                year      = 2022,
                booktitle = {Conference on Lifelong Learning Agents (CoLLAs)},
            }"""),
    },
    "npo": {
        "title": "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        "id": "2404.05868",
        "citation": textwrap.dedent("""\
            @inproceedings{zhang2024negative,
                title     = {{Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning}},
                author    = {Ruiqi Zhang and Licong Lin and Yu Bai and Song Mei},
                year      = 2024,
                booktitle = {Conference on Language Modeling (COLM)},
            }"""),
    },
    "simnpo": {
        "title": "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        "id": "2410.07163",
        "citation": textwrap.dedent("""\
            @article{fan2024simplicity,
                title   = {{Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning}},
                author  = {Chongyu Fan and Jiancheng Liu and Licong Lin and Jinghan Jia and Ruiqi Zhang and Song Mei and
                           Sijia Liu},
                year    = 2024,
                journal = {arXiv preprint arXiv:2410.07163},
            }"""),
    },
    "rmu": {
        "title": "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning",
        "id": "2403.03218",
        "citation": textwrap.dedent("""\
            @inproceedings{li2024wmdp,
                title     = {{The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning}},
                author    = {Nathaniel Li and Alexander Pan and others},
                year      = 2024,
                booktitle = {International Conference on Machine Learning (ICML)},
            }"""),
    },
    "undial": {
        "title": "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
        "id": "2402.10052",
        "citation": textwrap.dedent("""\
            @inproceedings{dong2025undial,
                title     = {{UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models}},
                author    = {Yijiang River Dong and Hongzhou Lin and Mikhail Belkin and Ram{\\'o}n Huerta and Ivan Vuli{\\'c}},
                year      = 2025,
                booktitle = {Conference of the Nations of the Americas Chapter of the ACL (NAACL)},
            }"""),
    },
    "ce_u": {
        "title": "CE-U: Cross Entropy Unlearning",
        "id": "2503.01224",
        "citation": textwrap.dedent("""\
            @article{yang2025ceu,
                title   = {{CE-U: Cross Entropy Unlearning}},
                author  = {Bo Yang},
                year    = 2025,
                journal = {arXiv preprint arXiv:2503.01224},
            }"""),
    },
}
