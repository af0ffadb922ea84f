// Renders a template of Ollama for chats: {"template": ..., "chats": [[{"Role", "Content"}]]} on
// standard input, a list of texts on standard output. As Ollama does, it joins all system messages
// and gives the template fields of a map, in which what is missing is zero.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	var asked struct {
		Template string
		Chats    [][]*message
	}
	check(json.NewDecoder(os.Stdin).Decode(&asked))
	parsed, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
	check(err)
	texts := []string{}
	for _, chat := range asked.Chats {
		system := []string{}
		for _, m := range chat {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		var made strings.Builder
		fields := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": chat}
		check(parsed.Execute(&made, fields))
		texts = append(texts, made.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}
