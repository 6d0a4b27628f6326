"""Code that does harm where it is run: what a model that writes code must not hand out unseen.

Each rule names one known habit (CWE where there is one). It is told by its writing alone: whether the harm is meant,
only a reader knows, so `flag` is the action that fits most of these.
"""

from __future__ import annotations

from aim_guardrail.detectors.code.rule import CodeRule, Phrase, phrase

_LABEL = "DANGEROUS_CODE"
_SHELL = r"(?:/bin/|/usr/bin/(?:env\s)?)?(?:ba|z|da|k|fi)?sh"
_INTERPRETER = rf"(?:{_SHELL}|python[23]?|perl|ruby|node|php|pwsh)"
# What a caller sent: Flask, Django, Express, PHP, the command line, the terminal.
_REQUEST = (
    r"(?:flask\.)?request\.(?:args|form|json|data|values|GET|POST|params|query|body|cookies)\b"
    r"|req\.(?:query|body|params|headers)\b|\$_(?:GET|POST|REQUEST|COOKIE)\b|input(?=\()|sys\.argv\b|params(?=\[)"
)
_RECEIVED = (
    r"(?:request|req)\.\w{1,20}|\w{0,12}\.recv(?:v|from)?\b|(?:resp|response|res|r)\.(?:content|body|raw|text)\b"
    r"|urlopen\b|self\.rfile\b|b64decode\b"
)
_VERB = r"(?:SELECT|INSERT|UPDATE|DELETE|REPLACE|select|insert|update|delete|replace)\b"
_CLAUSE = r"\b(?:WHERE|VALUES|SET|HAVING|LIKE|where|values|set|having|like)\b"
_NAME = r"[A-Za-z_$][\w.]{0,60}"


def _danger(rule_id: str, heads: str, ends: str, pattern: str, score: float = 0.9) -> Phrase:
    return phrase(f"danger.{rule_id}", _LABEL, heads, ends, pattern, score)


_RUNNERS = (
    "os.system os.popen subprocess.run subprocess.call subprocess.popen subprocess.check_output subprocess.check_call "
    "subprocess.getoutput commands.getoutput"
)
_DECODED = r"b64decode|a85decode|unhexlify|fromhex|decompress|atob|base64_decode|gzinflate|str_rot13"
_DOWNLOADED = r"DownloadString|Invoke-WebRequest|Invoke-RestMethod|iwr|irm"

_SHELL_RULES = (
    _danger(
        "rm-root",
        "rm",
        r"[/~]|\$HOME",
        r"rm(?:[ \t]{1,3}-{1,2}[a-zA-Z-]{1,30}){0,4}?[ \t]{1,3}(?:--recursive|-[a-zA-Z]{0,6}[rR][a-zA-Z]{0,6})"
        r"(?:[ \t]{1,3}-{1,2}[a-zA-Z-]{1,30}){0,4}"
        r"[ \t]{1,3}[\"']?(/(?:\*|(?:bin|boot|dev|etc|home|lib|opt|root|sbin|sys|usr|var)(?:/\*?)?)?|~(?:/\*?)?"
        r"|\$HOME(?:/\*?)?)(?![\w./*{$-])",
    ),
    _danger(
        "windows-wipe", "rd rmdir del", r"[cC]:", r"(?i:rd|rmdir|del)(?:\s{1,3}/[sqfaSQFA]){1,4}\s{1,3}[\"']?([cC]:)"
    ),
    _danger(
        "make-filesystem", "mkfs", r"/dev/", r"mkfs(?:\.\w{1,10})?(?:\s{1,3}-[\w=]{1,20}){0,4}\s{1,3}(/dev/\w{2,20})"
    ),
    _danger(
        "overwrite-disk",
        "dd",
        r"/dev/",
        r"dd\s[^\n|;&]{0,120}?\bof=(/dev/(?:[shv]d[a-z]|xvd|nvme|disk|mmcblk)\w{0,16})",
    ),
    _danger(
        "download-and-run",
        "curl wget fetch",
        rf"\b{_INTERPRETER}\b",
        rf"(?:curl|wget|fetch)\s[^\n]{{0,300}}?\|\s{{0,3}}(?:sudo\s{{1,3}}(?:-\w{{1,9}}\s{{1,3}}){{0,2}})?({_INTERPRETER})(?![\w./-])",
    ),
    _danger(
        "run-download",
        "bash sh zsh eval source",
        r"\b(?:curl|wget)",
        r"(?:(?:ba|z)?sh|eval|source)\s{1,3}(?:-c\s{1,3})?[\"']?(?:<\(|\$\(|`)\s{0,3}(curl|wget)(?![\w.-])",
    ),
    _danger(
        "powershell-download",
        "iwr irm invoke-webrequest invoke-restmethod iex invoke-expression",
        rf"(?i:\b(?:iex|Invoke-Expression|{_DOWNLOADED}))",
        r"(?i:iwr|irm|Invoke-WebRequest|Invoke-RestMethod)\b[^\n]{0,200}?\|\s{0,3}((?i:iex|Invoke-Expression))(?![\w-])"
        rf"|(?i:iex|Invoke-Expression)\b[^\n]{{0,80}}?((?i:{_DOWNLOADED}))(?![\w-])",
    ),
    _danger(
        "powershell-encoded",
        "powershell powershell.exe pwsh",
        r"[A-Za-z0-9+/=]{24}",
        r"(?i:powershell(?:\.exe)?|pwsh)\s[^\n]{0,80}?\s?-(?i:e|en|enc|encodedcommand)\s{1,3}([A-Za-z0-9+/=]{24,120})",
    ),
    _danger(
        "decode-and-run",
        "base64",
        rf"\b{_INTERPRETER}\b",
        rf"base64\s{{1,3}}(?:-d|-D|--decode)\b[^\n]{{0,60}}?\|\s{{0,3}}(?:sudo\s{{1,3}})?({_INTERPRETER})(?![\w./-])",
    ),
    _danger(
        "reverse-shell-tcp",
        "bash sh exec",
        r"/dev/(?:tcp|udp)/",
        r"(?:(?:ba)?sh\s{1,3}-i\b[^\n]{0,40}?|exec\s{1,3}[0-9]{1,3}<>\s{0,3})(/dev/(?:tcp|udp)/[\w.$-]{1,100}/[\w$]{1,20})",
    ),
    _danger(
        "reverse-shell-netcat",
        "nc ncat netcat",
        rf"{_SHELL}\b|\bcmd|\bpowershell",
        rf"(?:nc|ncat|netcat)\s[^\n|;]{{0,120}}?-[a-z]{{0,4}}[ec]\s{{1,3}}({_SHELL}|cmd(?:\.exe)?|powershell)(?![\w./-])",
    ),
    _danger(
        "reverse-shell-fifo",
        "mkfifo mknod",
        r"\b(?:nc|ncat|netcat|telnet)\b",
        r"(?:mkfifo|mknod)\s[^\n]{0,200}?\|\s{0,3}(nc|ncat|netcat|telnet)(?![\w.-])",
    ),
    _danger(
        "reverse-shell-dup2",
        "dup2",
        rf"{_SHELL}\b",
        rf"dup2\([^\n]{{0,40}}?fileno\(\)[^|]{{0,200}}?[\"']({_SHELL})(?![\w./-])",
    ),
    _danger(
        "reverse-shell-pty",
        "pty.spawn fsockopen",
        rf"{_SHELL}\b",
        rf"(?:pty\.spawn\(\[?[\"']|fsockopen\([^\n]{{0,160}}?)({_SHELL})(?![\w./-])",
        0.6,
    ),
    _danger("fork-bomb", ":()", r"&", r":\(\)\s{0,3}\{\s{0,3}:\s{0,3}\|\s{0,3}:\s{0,3}(&)"),
    _danger(
        "fork-forever",
        "while",
        r"\bfork",
        r"while[\s(]{1,3}(?:True|true|1)[\s)]{0,3}[:{\s]\s{0,20}(?:os\.)?(fork)(?![\w.-])",
    ),
    _danger(
        "world-writable",
        "chmod",
        r"777|a\+rwx",
        r"chmod(?:\s{1,3}-[a-zA-Z]{1,9}|\s{1,3}--[a-z-]{1,20}){0,3}\s{1,3}([0-7]?777|a\+rwx)(?![\w.])"
        r"|chmod\([^\n;]{0,80}?(0o?777)(?!\w)",
    ),
    _danger("authorized-keys", ">>", r"authorized_keys", r">>\s{0,3}[\"']?([\w~$./-]{0,60}authorized_keys)(?![\w.-])"),
    _danger("passwordless-sudo", "all", r"NOPASSWD", r"ALL\s?=\s?\(ALL(?::ALL)?\)\s{0,3}(NOPASSWD)"),
    _danger("read-shadow", "cat", r"/etc/shadow", r"cat\s{1,3}(/etc/shadow)(?![\w.-])"),
    _danger("mining-pool", "stratum", r"//", r"stratum\+(?:tcp|ssl):(//[\w.-]{1,100})"),
)

_CODE_RULES = (
    _danger(
        "run-request",
        # CWE-95, CWE-78
        f"eval exec system popen execsync passthru shell_exec function {_RUNNERS}",
        rf"{_REQUEST.replace('(?=', '(?:')}",
        rf"(?:eval|exec|system|popen|execSync|passthru|shell_exec|Function|[a-z]{{2,10}}\.[A-Za-z_]{{3,12}})\s{{0,2}}\([^\n;#)\[]{{0,60}}?({_REQUEST})",
    ),
    _danger(
        "run-decoded",
        "eval exec assert",
        rf"\b(?:{_DECODED})",
        rf"(?:eval|exec|assert)\s{{0,2}}\([^\n;#)]{{0,60}}?({_DECODED})(?=[(\s.])",
    ),
    _danger(
        "shell-injection",
        _RUNNERS,
        r"[\w.]}|\+",  # CWE-78
        r"(?:os\.(?:system|popen)|(?:subprocess|commands)\.(?:run|call|Popen|check_output|check_call|getoutput))\("
        rf"\s{{0,8}}(?:f[\"'][^\n{{\"]{{0,160}}\{{({_NAME})(?=}})|(?:\"[^\n\"]{{0,160}}\"|'[^\n']{{0,160}}')\s{{0,4}}(\+)(?![+=]))",
        0.6,
    ),
    _danger(
        "unpickle-received",
        "pickle cpickle _pickle dill cloudpickle marshal jsonpickle objectinputstream",  # CWE-502
        rf"{_RECEIVED}|getInputStream",
        rf"(?:_?c?[Pp]ickle|dill|cloudpickle|marshal|jsonpickle)\.(?:loads?|decode|Unpickler)\s?\([^\n;#)]{{0,60}}?\b({_RECEIVED})"
        r"|ObjectInputStream\s?\([^\n;]{0,60}?\b(\w{0,12}\.?getInputStream)\b",
    ),
    _danger(
        "unsafe-yaml",
        "yaml",
        r"unsafe_load|UnsafeLoader|full_load",
        r"yaml\.(?:(unsafe_load(?:_all)?)\b|load(?:_all)?\([^\n]{0,80}?((?:yaml\.)?UnsafeLoader)\b)",
    ),
    _danger(
        "sql-concatenation",
        "execute executemany query raw executequery executeupdate sql stmt statement mysqli_query",
        r"\+|%|\|\||[\w.]}|\bformat|\$\w",  # CWE-89
        rf"\w{{3,15}}(?:\s?\(|\s?\+?=)[\s(]{{0,10}}(?:\$\w{{1,20}},\s?)?"
        rf"(?:[fF](?P<q>[\"'])(?:(?P=q){{2}})?\s{{0,20}}{_VERB}[^\"]{{0,160}}?{_CLAUSE}[^\"{{]{{0,100}}\{{({_NAME})(?=}})"
        rf"|\"\s{{0,20}}{_VERB}[^\"\n]{{0,240}}\"\s{{0,4}}(?:(\+)(?!=)|(%)|(\|\|)|\.(format)(?=\()|\.\s?(\$\w{{1,20}}))"
        rf"|'\s{{0,20}}{_VERB}[^'\n]{{0,240}}'\s{{0,4}}(?:(\+)(?!=)|(%)|(\|\|)|\.(format)(?=\()))",
        0.6,
    ),
    _danger(
        "no-tls-verification",
        "verify check_hostname rejectunauthorized insecureskipverify curlopt_ssl_verifypeer "  # CWE-295
        "node_tls_reject_unauthorized http.sslverify stricthostkeychecking ssl_verify",
        r"(?i:false|true)|\b0|\bno\b",
        r"(?:verify|check_hostname|ssl_verify)\s?=\s?(False)\b|rejectUnauthorized[\"']?\s?:\s?(false)\b"
        r"|InsecureSkipVerify\s?[:=]\s?(true)\b|CURLOPT_SSL_VERIFYPEER,?\s?=?>?\s?(0|false|FALSE)\b"
        r"|NODE_TLS_REJECT_UNAUTHORIZED[\"'\]]{0,2}\s?=\s?[\"']?(0)(?!\w)"
        r"|http\.sslVerify[\s=]{1,3}[\"']?(false)\b|StrictHostKeyChecking[\s=]{1,3}(no)\b",
        0.6,
    ),
    _danger(
        "unverified-context",
        "ssl _create_unverified_context",
        r"_create_unverified_context",
        r"ssl\.(_create_unverified_context)\b|(_create_unverified_context)(?=\()",
        0.6,
    ),
    _danger(
        "insecure-download",
        "curl wget",
        r"--insecure|-[a-zA-Z]{0,6}k\b|--no-check-certificate",
        r"curl\s[^\n|;]{0,80}?(?<=\s)(--insecure|-[a-zA-Z]{0,6}k)(?![\w=-])|wget\s[^\n|;]{0,120}?(--no-check-certificate)\b",
        0.6,
    ),
    _danger(
        "cross-site-scripting",
        "innerhtml document.write outerhtml",
        r"location\.|\$_",  # CWE-79
        r"(?:innerHTML|outerHTML|document\.write)\s{0,2}(?:\+?=|\()[^\n;]{0,60}?\b((?:window\.|document\.)?location\.(?:hash|search|href))\b",
        0.6,
    ),
)
DANGER_RULES: tuple[CodeRule, ...] = (*_SHELL_RULES, *_CODE_RULES)
