package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"os"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"
	logrusslog "github.com/sirupsen/logrus/hooks/slog"
	logrussyslog "github.com/sirupsen/logrus/hooks/syslog"
)

// newLogger makes the service's logger. The packages know only *slog.Logger;
// logrus is the sink that formats and delivers. The second logger ignores the
// level, for the few lines that must always be there.
func newLogger(cfg config, stderr io.Writer) (log, always *slog.Logger, err error) {
	return newLoggerAt(new(slog.LevelVar), cfg, stderr)
}

// newLoggerAt is newLogger with a level that can be changed later.
func newLoggerAt(level *slog.LevelVar, cfg config, stderr io.Writer) (log, always *slog.Logger, err error) {
	level.Set(levels[cfg.LogLevel])
	sink := logrus.New()
	sink.SetOutput(stderr)
	sink.SetLevel(logrus.DebugLevel) // what is filtered, levelHandler filters
	format := cfg.LogFormat
	if format == "auto" {
		format = autoFormat(stderr)
	}
	switch format {
	case "json":
		sink.SetFormatter(&logrus.JSONFormatter{})
	case "journal":
		sink.SetFormatter(&journalFormatter{logrus.TextFormatter{DisableTimestamp: true, DisableColors: true}})
	case "syslog":
		hook, err := logrussyslog.NewSyslogHook("", "", syslog.LOG_DAEMON|syslog.LOG_INFO, "xapi-nbd")
		if err != nil && cfg.LogFormat == "syslog" {
			return nil, nil, fmt.Errorf("log_format = \"syslog\": %w", err)
		}
		if err == nil {
			sink.AddHook(hook)
			sink.SetOutput(io.Discard)
			sink.SetFormatter(&logrus.TextFormatter{DisableTimestamp: true, DisableColors: true})
		}
	default:
		sink.SetFormatter(&logrus.TextFormatter{FullTimestamp: true, DisableColors: true})
	}
	handler := logrusslog.NewHandler(sink, nil)
	return slog.New(levelHandler{handler, level}), slog.New(handler), nil
}

var levels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "error": slog.LevelError,
}

// autoFormat looks where standard error goes. The original's unit sends it to
// /dev/null, and there the log must not follow.
func autoFormat(stderr io.Writer) string {
	if stderr != os.Stderr {
		return "text"
	}
	if ok, err := journal.StderrIsJournalStream(); err == nil && ok {
		return "journal"
	}
	here, err1 := os.Stderr.Stat()
	null, err2 := os.Stat(os.DevNull)
	if err1 == nil && err2 == nil && os.SameFile(here, null) {
		return "syslog"
	}
	return "text"
}

// levelHandler drops what is below its level.
type levelHandler struct {
	slog.Handler
	level *slog.LevelVar
}

func (h levelHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

func (h levelHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return levelHandler{h.Handler.WithAttrs(attrs), h.level}
}

func (h levelHandler) WithGroup(name string) slog.Handler {
	return levelHandler{h.Handler.WithGroup(name), h.level}
}

// journalFormatter marks each line with its priority, which the journal takes
// from a line's front (sd-daemon(3)), and leaves the time to the journal.
type journalFormatter struct{ logrus.TextFormatter }

func (f *journalFormatter) Format(e *logrus.Entry) ([]byte, error) {
	line, err := f.TextFormatter.Format(e)
	if err != nil {
		return nil, err
	}
	priority := map[logrus.Level]int{logrus.ErrorLevel: 3, logrus.WarnLevel: 4, logrus.InfoLevel: 6, logrus.DebugLevel: 7}[e.Level]
	var b bytes.Buffer
	fmt.Fprintf(&b, "<%d>", priority)
	b.Write(line)
	return b.Bytes(), nil
}
