"""What the rendered lines say: English, Chinese, and figures such as dates, prices and addresses."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np

PROSE = Path("/usr/share/common-licenses")  # English text that every Debian system has
CHINESE = """
北京 上海 广州 深圳 成都 南京 中国 世界 城市 国家 人民 公司 学校 大学 医院 银行 车站 机场 火车 汽车 飞机 地铁 道路
桥梁 河流 山水 春天 夏天 秋天 冬天 今天 明天 昨天 早上 晚上 时间 星期 年月 天气 下雨 阳光 温度 空气 环境 森林 海洋
动物 植物 花园 果树 苹果 香蕉 学生 老师 朋友 家庭 父亲 母亲 孩子 先生 女士 经理 医生 工人 农民 作家 记者 警察 司机
演员 音乐 电影 电视 新闻 报纸 杂志 图书 文化 电脑 手机 网络 软件 硬件 数据 模型 程序 系统 信息 技术 科学 研究 发展
工程 设计 生产 质量 安全 管理 服务 市场 价格 经济 贸易 投资 合同 发票 编号 日期 地址 电话 姓名 性别 身份证 邮编 收件人
数量 单价 金额 合计 税率 备注 说明 注意事项 有效期 生产日期 保质期 配料表 欢迎光临 请勿吸烟 小心地滑 紧急出口 禁止停车
营业时间 免费停车 谢谢合作 节约用水 保持安静 高高兴兴 实事求是 四面八方 一心一意
""".split()  # noqa: SIM905


@functools.cache
def _words() -> list[str]:
    text = (PROSE / "GPL-2").read_text() + (PROSE / "Artistic").read_text()
    return re.findall(r"[A-Za-z]+[,.;]?", text)


def english(rng: np.random.Generator, words: tuple[int, int] = (1, 6)) -> str:
    """A run of words of a licence, sometimes in capitals."""
    start, count = rng.integers(len(_words()) - 8), rng.integers(words[0], words[1] + 1)
    text = " ".join(_words()[start : start + count])
    return text.upper() if rng.random() < 0.15 else text


def chinese(rng: np.random.Generator) -> str:
    """Two to five words, sometimes with a number among them, sometimes with rarer characters, as in names."""
    words = [str(word) for word in rng.choice(CHINESE, rng.integers(2, 6))]
    if rng.random() < 0.25:
        words.insert(int(rng.integers(len(words))), str(rng.integers(1, 2030)))
    if rng.random() < 0.4:
        words.append("".join(_character(rng) for _ in range(rng.integers(2, 5))))
    return "".join(words)


def _character(rng: np.random.Generator) -> str:
    """One of the 3,755 common characters of GB 2312, its rows 16 to 55, whose last five cells are empty."""
    row, cell = divmod(int(rng.integers(3755)), 94)
    return bytes((0xB0 + row, 0xA1 + cell)).decode("gb2312")


def figures(rng: np.random.Generator) -> str:
    """A date, a price, a telephone number, an address of mail or a code."""
    year, month, day, number = (int(rng.integers(*ends)) for ends in ((1990, 2030), (1, 13), (1, 29), (100, 99999)))
    name = re.sub(r"\W", "", english(rng, (1, 1)).lower())
    kinds = (
        f"{year}-{month:02}-{day:02} {month + 9}:{day + 10}",
        f"${number / 100:.2f}",
        f"+{month}-{number}-{year}",
        f"{name}{day}@{name}.org",
        f"No.{number}/{year} ({day}%)",
    )
    return kinds[int(rng.integers(len(kinds)))]


def line(rng: np.random.Generator) -> str:
    """Text for one line: half of them Chinese."""
    kind = rng.choice(3, p=(0.35, 0.5, 0.15))
    return (english, chinese, figures)[int(kind)](rng)
