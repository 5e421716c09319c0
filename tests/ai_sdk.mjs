// Vercel's AI SDK with its defaults, for tests/test_server.py. One JSON request on stdin, one JSON answer on stdout.
// MINIMIND_NODE is the folder where npm installed it.
import fs from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";

const require = createRequire(path.join(process.env.MINIMIND_NODE, "node_modules", "ai"));
const {generateText, jsonSchema, stepCountIs, streamText, tool} = require("ai");
const {createOpenAI} = require("@ai-sdk/openai");

const {url, question, tools, result} = JSON.parse(fs.readFileSync(0, "utf-8"));
const options = {model: createOpenAI({baseURL: url, apiKey: "none"})("minimind"), temperature: 0,
    stopWhen: stepCountIs(3), tools: Object.fromEntries(tools.map(({name, description, parameters}) =>
        [name, tool({description, inputSchema: jsonSchema(parameters), execute: async () => result})]))};
const whole = await generateText({...options, prompt: question});
const streamed = streamText({...options, prompt: question});
let text = "";
for await (const piece of streamed.textStream)
    text += piece;
// another turn: its answers of the first one are sent as references to the server's items
const messages = [{role: "user", content: question}, ...(await streamed.response).messages, {role: "user", content: "?"}];
await generateText({...options, messages});
console.log(JSON.stringify({whole: whole.text, text, calls: whole.steps[0].toolCalls.map((call) => call.input)}));
