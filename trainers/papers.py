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
