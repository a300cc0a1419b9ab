package logging

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/sirupsen/logrus"
	logrusslog "github.com/sirupsen/logrus/hooks/slog"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
)

// New returns two loggers that write to stderr, or to syslog, in the format of the
// settings. level is set to that of the settings and filters the first one; the second
// one has no filter, for the few lines that every log needs. Writing blocks until the
// line has been taken.
func New(level *slog.LevelVar, cfg config.Config, stderr io.Writer) (log, always *slog.Logger) {
	out, formatter := logOutput(cfg, stderr)
	return loggers(level, cfg, out, formatter)
}

// NewQueued is New with loggers that never block: lines go through the queue. The caller
// calls Flush before the process ends.
func NewQueued(level *slog.LevelVar, cfg config.Config, stderr io.Writer) (log, always *slog.Logger, queue *Queue) {
	out, formatter := logOutput(cfg, stderr)
	queue = newQueue(out, func(lines int) []byte { return droppedLine(formatter, lines) })
	log, always = loggers(level, cfg, queue, formatter)
	return log, always, queue
}

func loggers(level *slog.LevelVar, cfg config.Config, out io.Writer, formatter logrus.Formatter) (log, always *slog.Logger) {
	level.Set(Levels[cfg.LogLevel])
	sink := logrus.New()
	sink.SetOutput(out)
	sink.SetFormatter(formatter)
	sink.SetLevel(logrus.DebugLevel) // levelHandler filters
	handler := logrusslog.NewHandler(sink, nil)
	return slog.New(levelHandler{handler, level}), slog.New(handler)
}

// logOutput returns the writer of lines and their format.
func logOutput(cfg config.Config, stderr io.Writer) (io.Writer, logrus.Formatter) {
	format := cfg.LogFormat
	if format == "auto" {
		format = autoFormat(stderr)
	}
	switch format {
	case "json":
		return stderr, &logrus.JSONFormatter{}
	case "journal":
		return stderr, newPriorityFormatter()
	case "syslog":
		return &syslogWriter{fallback: stderr, dial: dialSyslog}, newPriorityFormatter()
	}
	return stderr, &logrus.TextFormatter{FullTimestamp: true, DisableColors: true}
}

// droppedLine formats the line that says how many lines are missing before it.
func droppedLine(formatter logrus.Formatter, lines int) []byte {
	line, err := formatter.Format(&logrus.Entry{
		Logger: logrus.StandardLogger(), // the formatter looks at it
		Time:   time.Now(), Level: logrus.WarnLevel,
		Message: "log lines were dropped: they were not taken in time, or could not be written",
		Data:    logrus.Fields{"lines": lines},
	})
	if err != nil {
		return nil // cannot happen with a number
	}
	return line
}

// Levels are the values of the setting log_level.
var Levels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "error": slog.LevelError,
}

// autoFormat chooses a format by where standard error goes. The unit of the original
// service sends it to /dev/null: then syslog gets the log.
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

// levelHandler drops records below its level.
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

// priorityFormatter marks each line with its priority, in angle brackets in front
// of it (sd-daemon(3)), and leaves the time to those who receive it.
type priorityFormatter struct{ logrus.TextFormatter }

func newPriorityFormatter() *priorityFormatter {
	return &priorityFormatter{logrus.TextFormatter{DisableTimestamp: true, DisableColors: true}}
}

// Format implements logrus.Formatter.
func (f *priorityFormatter) Format(e *logrus.Entry) ([]byte, error) {
	line, err := f.TextFormatter.Format(e)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "<%d>%s", priorities[e.Level], line), nil
}

var priorities = map[logrus.Level]syslog.Priority{
	logrus.ErrorLevel: syslog.LOG_ERR, logrus.WarnLevel: syslog.LOG_WARNING,
	logrus.InfoLevel: syslog.LOG_INFO, logrus.DebugLevel: syslog.LOG_DEBUG,
}

// syslogWriter passes the lines of a priorityFormatter on to syslog, and to
// fallback as long as syslog cannot be reached, as may be at boot.
type syslogWriter struct {
	fallback io.Writer
	dial     func() (*syslog.Writer, error)
	log      *syslog.Writer // nil: not reached yet; connects anew by itself later
}

// Write implements io.Writer.
func (s *syslogWriter) Write(line []byte) (int, error) {
	priority, text := syslog.LOG_INFO, line
	if len(line) > 3 && line[0] == '<' && line[2] == '>' {
		priority, text = syslog.Priority(line[1]-'0'), line[3:]
	}
	if s.log == nil {
		s.log, _ = s.dial() // the next line tries again
	}
	if s.log != nil && s.send(priority, string(text)) == nil {
		return len(line), nil
	}
	if _, err := s.fallback.Write(text); err != nil {
		return 0, err
	}
	return len(line), nil
}

func dialSyslog() (*syslog.Writer, error) {
	return syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, "xapi-nbd")
}

func (s *syslogWriter) send(priority syslog.Priority, text string) error {
	switch priority {
	case syslog.LOG_ERR:
		return s.log.Err(text)
	case syslog.LOG_WARNING:
		return s.log.Warning(text)
	case syslog.LOG_DEBUG:
		return s.log.Debug(text)
	}
	return s.log.Info(text)
}
