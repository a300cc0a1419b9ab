// Package logging formats the log as text, JSON, or for the journal or syslog, and queues
// its lines, so that a reader of the log that is stuck blocks nothing.
//
// It does not know the lines: all packages log through *slog.Logger.
package logging
