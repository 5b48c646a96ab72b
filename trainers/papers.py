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
