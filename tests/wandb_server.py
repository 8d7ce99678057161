"""A small stand-in for a Weights & Biases server, on this machine.

It does enough for an online `wandb.init`, `run.log` and `run.finish`.
"""
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Run:
    "What the server knows about one run."
    entity: str
    project: str
    name: str = ""
    history: list = field(default_factory=list) # one dict for each line, in the order of arrival
    starts: int = 0                             # how often `wandb.init` started or resumed it
    resumed: bool = False                       # whether the last `wandb.init` found it here
    files: list = field(default_factory=list)   # names of the uploaded files
    exit_code: int | None = None                # None until `run.finish` has reached the server

class WandbServer(ThreadingHTTPServer):
    """Use it in a `with` statement. You can change `mode` at any time.

    The modes are `ok`, `silent` (accepts connections, never answers) and `errors` (answers HTTP 500).
    """
    daemon_threads = True
    block_on_close = False

    def __init__(self, mode="ok"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.stopped, self.lock = mode, False, threading.Lock()
        self.runs = {}     # id -> Run
        self.requests = [] # names of the GraphQL operations and paths of all other requests, in every mode
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0"*40,
                            "WANDB_ERROR_REPORTING": "false"}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_): self.stop()

    def stop(self):
        "From now on connections are refused. Those that wait for an answer are closed."
        if self.stopped: return
        self.stopped = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address): pass # a client was killed or gave up

    def answer(self, operation, values):
        "The data for one GraphQL request."
        entity, project, name = values.get("entity") or "someone", values.get("project"), values.get("name")
        where = {"id": "p", "name": project, "entity": {"id": "e", "name": entity}}
        if operation == "RunResumeStatus":
            return {"model": {**where, "bucket": self.bucket(self.runs.get(name))}}
        if operation == "UpsertBucket":
            if inserted := name not in self.runs: self.runs[name] = Run(entity, project)
            run = self.runs[name]
            if values.get("displayName"): run.name = values["displayName"]
            if values.get("host"): # later calls only change the configuration
                run.starts, run.resumed = run.starts + 1, not inserted
            return {"upsertBucket": {"bucket": {**self.bucket(run), "name": name, "project": where},
                                     "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{values['run']}/{file}"}
                     for file in values["files"]]
            return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}
        viewer = {"id": "u", "entity": "someone", "username": "someone", "email": "", "flags": "{}",
                  "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"features": []}}

    def bucket(self, run):
        "The state of a run. A resumed run continues from it."
        if run is None: return None
        tail = json.dumps([json.dumps(line) for line in run.history[-1:]])
        return {"id": "r", "name": "r", "displayName": run.name, "notes": "", "tags": [], "config": "{}",
                "summaryMetrics": "{}",
                "wandbConfig": '{"t": 1}',      # without it, the run counts as never started
                "historyTail": tail, "eventsTail": "[]", "historyLineCount": len(run.history),
                "eventsLineCount": 0, "logLineCount": 0}

class Handler(BaseHTTPRequestHandler):
    "One request on each connection."
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body) if self.command == "POST" else {}
        operation = asked.get("operationName") or self.path
        self.server.requests.append(operation)
        while self.server.mode == "silent" and not self.server.stopped: time.sleep(0.02)
        if self.server.stopped: return
        if self.server.mode == "errors": return self.send_error(500)
        with self.server.lock: self.reply(self.take(operation, asked))

    do_PUT = do_POST # of a file

    def take(self, operation, asked):
        "Records what came in. Returns the answer."
        if self.path == "/graphql":
            return {"data": self.server.answer(operation, asked.get("variables") or {})}
        parts = self.path.strip("/").split("/")
        if parts[0] == "upload": self.server.runs[parts[1]].files.append("/".join(parts[2:]))
        if parts[-1] == "file_stream":
            run = self.server.runs[parts[-2]]
            sent = asked.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            run.history += map(json.loads, sent)
            if asked.get("complete"): run.exit_code = asked["exitcode"]
        return {}

    def reply(self, values):
        "Sends them as JSON."
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): pass # nothing on stderr
