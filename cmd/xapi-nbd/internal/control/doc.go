// Package control connects the commands status and cleanup to the running service: HTTP
// on a unix socket in the state folder. [Server] is the service's side, [Ask] that of the
// commands, the Report types are the answers, and [Screen] shows a status to people.
//
// It does not know how the service obtains its answers: that is behind [Service].
package control
