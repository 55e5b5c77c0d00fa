-- A state file as version 3 of the schema wrote it: made by its own code, dumped by SQLite.
PRAGMA user_version = 3;
BEGIN TRANSACTION;
CREATE TABLE environments (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    uid INTEGER NOT NULL,
    user TEXT NOT NULL,
    slot INTEGER NOT NULL UNIQUE,
    netns TEXT NOT NULL UNIQUE,
    labels TEXT NOT NULL,
    share TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at TEXT NOT NULL,
    boot_id TEXT NOT NULL, stock TEXT NOT NULL DEFAULT '', resources TEXT NOT NULL DEFAULT '{}',
    UNIQUE (uid, name)
) STRICT;
INSERT INTO "environments" VALUES('5f0c7f1e-0000-4000-8000-000000000001','web',1001,'alice',0,'web','{"team": "shop"}','owner','ready','2026-11-20T10:00:00.000001Z','boot','','{}');
INSERT INTO "environments" VALUES('5f0c7f1e-0000-4000-8000-000000000002','web',1002,'bob',7,'web.bob','{}','owner','removing','2026-11-20T10:00:01.000000Z','boot','','{}');
INSERT INTO "environments" VALUES('5f0c7f1e-0000-4000-8000-000000000003','lab',1001,'alice',3,'lab','{}','owner','creating','2026-11-20T10:00:02.000000Z','earlier boot','','{}');
INSERT INTO "environments" VALUES('5f0c7f1e-0000-4000-8000-000000000004','shop-0a1b2c3d',1001,'alice',4,'shop-0a1b2c3d','{"app": "shop"}','owner','ready','2026-11-21T10:00:03.000000Z','boot','6e0c7f1e-0000-4000-8000-000000000001','{}');
INSERT INTO "environments" VALUES('5f0c7f1e-0000-4000-8000-000000000005','kept',1001,'alice',5,'kept','{}','owner','ready','2026-11-22T10:00:00.000000Z','boot','','{"pids":64}');
CREATE TABLE ports (
    environment TEXT NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    port INTEGER NOT NULL,
    protocol TEXT NOT NULL,
    published INTEGER NOT NULL,
    listen TEXT NOT NULL,
    PRIMARY KEY (protocol, published)
) STRICT;
INSERT INTO "ports" VALUES('5f0c7f1e-0000-4000-8000-000000000001',3000,'tcp',20000,'127.0.0.1');
INSERT INTO "ports" VALUES('5f0c7f1e-0000-4000-8000-000000000001',53,'udp',20001,'127.0.0.1');
INSERT INTO "ports" VALUES('5f0c7f1e-0000-4000-8000-000000000002',8080,'tcp',20007,'127.0.0.1');
INSERT INTO "ports" VALUES('5f0c7f1e-0000-4000-8000-000000000004',3000,'tcp',20005,'127.0.0.1');
CREATE TABLE services (
    environment TEXT NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    command TEXT NOT NULL,
    state TEXT NOT NULL,
    pid INTEGER,
    launch_id TEXT,
    exit_code INTEGER, restart TEXT NOT NULL DEFAULT 'no', health_check TEXT, restarts INTEGER NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0, health TEXT,
    PRIMARY KEY (environment, name)
) STRICT;
INSERT INTO "services" VALUES('5f0c7f1e-0000-4000-8000-000000000001','web','{"argv": ["npm", "run", "dev"], "env": {"PATH": "/usr/bin:/bin", "QUOTED": "it''s \"\u00e9\"\nand \ud83d\ude00"}, "cwd": "/srv/web", "uid": 1001, "gid": 1001, "groups": [27, 1001], "umask": 18, "limits": {"nofile": 4096, "core": -1}, "setuid": false}','running',4242,'launch-web',NULL,'no',NULL,0,0,NULL);
INSERT INTO "services" VALUES('5f0c7f1e-0000-4000-8000-000000000001','db','{"argv": ["postgres", "-D", "/srv/db"], "env": {}, "cwd": "/", "uid": 1001, "gid": 1001, "groups": [1001], "umask": 63, "limits": {}, "setuid": true}','exited',NULL,'launch-db',137,'no',NULL,0,0,NULL);
INSERT INTO "services" VALUES('5f0c7f1e-0000-4000-8000-000000000002','main','{"argv": ["./job"], "env": {"N": "7"}, "cwd": "/home/bob", "uid": 1002, "gid": 1002, "groups": [], "umask": 18, "limits": {}, "setuid": false}','stopped',NULL,'launch-job',0,'no',NULL,0,0,NULL);
INSERT INTO "services" VALUES('5f0c7f1e-0000-4000-8000-000000000004','web','{"argv": ["npm", "run", "dev"], "env": {"PATH": "/usr/bin:/bin", "QUOTED": "it''s \"\u00e9\"\nand \ud83d\ude00"}, "cwd": "/srv/web", "uid": 1001, "gid": 1001, "groups": [27, 1001], "umask": 18, "limits": {"nofile": 4096, "core": -1}, "setuid": false}','running',4243,'launch-shop',NULL,'no',NULL,0,0,NULL);
INSERT INTO "services" VALUES('5f0c7f1e-0000-4000-8000-000000000005','web','{"argv": ["npm", "run", "dev"], "env": {"PATH": "/usr/bin:/bin", "QUOTED": "it''s \"\u00e9\"\nand \ud83d\ude00"}, "cwd": "/srv/web", "uid": 1001, "gid": 1001, "groups": [27, 1001], "umask": 18, "limits": {"nofile": 4096, "core": -1}, "setuid": false}','restarting',NULL,'launch-kept',1,'on-failure','{"tcp":null,"http":"/","port":3000,"command":null,"interval_seconds":10.0,"timeout_seconds":5.0,"retries":3,"start_period_seconds":30.0}',3,2,'unhealthy');
CREATE TABLE templates (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    uid INTEGER NOT NULL,
    user TEXT NOT NULL,
    gid INTEGER NOT NULL,
    other_gids TEXT NOT NULL,
    warm INTEGER NOT NULL,
    specification TEXT NOT NULL,
    created_at TEXT NOT NULL,
    UNIQUE (uid, name)
) STRICT;
INSERT INTO "templates" VALUES('6e0c7f1e-0000-4000-8000-000000000001','shop',1001,'alice',1001,'[27]',2,'{"command":null,"services":[{"name":"web","command":["npm","run","dev"],"env":{"A":"x=y"},"cwd":null,"setuid":true}],"ports":[{"port":3000,"protocol":"tcp","publish":20005}],"env":{"SECRET":"é"},"cwd":"/srv","labels":{"app":"shop"},"share":"owner","setuid":false,"umask":23,"limits":{"nofile":-1}}','2026-11-21T10:00:00.000000Z');
INSERT INTO "templates" VALUES('6e0c7f1e-0000-4000-8000-000000000002','plain',1002,'bob',1002,'[]',0,'{"command":["true"],"services":null,"ports":[],"env":{},"cwd":null,"labels":{},"share":"owner","setuid":false,"umask":18,"limits":{}}','2026-11-21T10:00:01.000000Z');
CREATE INDEX ports_by_environment ON ports (environment);
COMMIT;
